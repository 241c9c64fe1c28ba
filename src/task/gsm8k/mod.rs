//! GSM8K ("Training Verifiers to Solve Math Word Problems", Cobbe et al. 2021, arXiv:2110.14168):
//! word problems whose answer ends in a number.

pub mod score;

//! What a training loses whose teacher is known by its likeliest tokens and the mass of all others: the error
//! of the loss, and of its gradient at the hidden state, against the whole teacher.
//!
//!     cargo bench --bench cached_teacher -- TEACHER STUDENT TEXT [WINDOWS] [LENGTH]
//!
//! TEACHER and STUDENT are models as `--model` takes them, TEXT a text file of which the first WINDOWS (8)
//! windows of LENGTH (256) tokens are taken. Printed as a table of docs/training.md.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measurement may end by panicking

use burn::tensor::{DType, Device, Tensor};
use fewbit::data::Tokenizer;
use fewbit::export::{OpenModel, open_model};
use fewbit::model::{CausalLm, Loader, Positions};
use fewbit::ops::{self, Comparison, Divergence, LossValue};
use fewbit::store::locate;

const KEPT: [usize; 6] = [4, 16, 64, 128, 256, 1024];
const KINDS: [(&str, Divergence); 4] = [
    ("kl_forward", Divergence::KlForward),
    ("kl_reverse", Divergence::KlReverse),
    ("jsd", Divergence::Jsd { beta: 0.5 }),
    ("adaptive", Divergence::Adaptive { near: 0.1, far: 0.5 }),
];

/// Sums over windows for one objective and number of kept tokens.
#[derive(Clone, Copy, Default)]
struct Sums {
    whole: f64,
    kept: f64,
    /// Squared norms of the whole gradient and of the difference.
    gradient: f64,
    difference: f64,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let [teacher, student, text, rest @ ..] = &args[..] else {
        println!("cached_teacher TEACHER STUDENT TEXT [WINDOWS] [LENGTH]");
        return;
    };
    let number = |at: usize, default| rest.get(at).map_or(default, |n| n.parse().unwrap());
    let (windows, length): (usize, usize) = (number(0, 8), number(1, 256));
    let device = Device::flex();
    let path = locate::model(teacher).unwrap();
    let tokens = Tokenizer::load(&path).unwrap().encode(&std::fs::read_to_string(text).unwrap());
    let tokens = tokens.unwrap();
    let [teacher, student] =
        [path, locate::model(student).unwrap()].map(|path| open_model(&path).unwrap());
    let [teacher, student] = [&teacher, &student].map(|opened| whole(opened, &device));
    let mut sums = [[Sums::default(); KEPT.len()]; KINDS.len()];
    let mut left = [0.0; KEPT.len()];
    let windows: Vec<&[u32]> = tokens.chunks_exact(length).take(windows).collect();
    for window in &windows {
        let hidden = |model: &CausalLm| {
            let positions = Positions::new(&model.config, 0, length, DType::F32, &device);
            let hidden = model.hidden(CausalLm::tokens(&[window], &device), &positions);
            let [_, seq, width] = hidden.dims();
            model.logits(hidden.reshape([seq, width]))
        };
        let (goal, logits) = (hidden(&teacher), hidden(&student));
        let weights = Tensor::<2>::ones([length, 1], &device) / length as f64;
        for (at, k) in KEPT.into_iter().enumerate() {
            let kept = ops::likeliest(goal.clone(), k, 1.0);
            let mass = kept.log_rest.iter().map(|log| f64::from(*log).exp()).sum::<f64>();
            left[at] += mass / length as f64 / windows.len() as f64;
            let known = kept.logits(0..length, teacher.vocab(), 1.0, &device);
            for (kind, sums) in KINDS.iter().zip(&mut sums) {
                let of = |top_k, teacher: &Tensor<2>| {
                    let comparison = Comparison {
                        divergence: kind.1,
                        temperature: 1.0,
                        top_k,
                        tail: top_k.is_some(),
                    };
                    ops::divergence(&comparison, logits.clone(), teacher.clone(), weights.clone())
                };
                add(&mut sums[at], of(None, &goal), of(Some(k), &known), &logits, &student);
            }
        }
    }
    println!("| kept | mass of the rest | {} |", KINDS.map(|(name, _)| name).join(" | "));
    println!("|---|---|{}", "---|".repeat(KINDS.len()));
    for (at, k) in KEPT.into_iter().enumerate() {
        let cell = |sums: &[Sums; KEPT.len()]| {
            let Sums { whole, kept, gradient, difference } = sums[at];
            let loss = 100.0 * (kept - whole) / whole;
            format!("{loss:+.2} %, {:.2} %", 100.0 * (difference / gradient).sqrt())
        };
        let cells: Vec<String> = sums.iter().map(cell).collect();
        println!("| {k} | {:.4} | {} |", left[at], cells.join(" | "));
    }
}

fn whole(opened: &OpenModel, device: &Device) -> CausalLm {
    let loader = Loader { config: &opened.config, source: opened, device, dtype: DType::F32 };
    loader.model().unwrap()
}

fn add(sums: &mut Sums, whole: LossValue, kept: LossValue, logits: &Tensor<2>, student: &CausalLm) {
    let [of_whole, of_kept] =
        [whole.gradient, kept.gradient].map(|gradient| student.head_gradient(gradient, logits));
    sums.whole += f64::from(whole.value.into_scalar::<f32>());
    sums.kept += f64::from(kept.value.into_scalar::<f32>());
    let square = |x: Tensor<2>| ops::squared_norm(x).values().into_iter().sum::<f64>();
    sums.gradient += square(of_whole.clone());
    sums.difference += square(of_kept - of_whole);
}

//! Experts of a block: tokens sorted by the expert they go to, one product per linear and expert over its
//! tokens together, and the results put back in the tokens' order.

use burn::tensor::{DType, Int, Tensor, TensorData, activation};

use super::arch::{Experts, Role, Site};
use super::block::{Block, Part, Tap, gated};
use crate::ops;

/// Where tokens go.
struct Routes {
    /// Rows of the stream sorted by expert, one for each visit, `[visits]`.
    rows: Vec<i32>,
    /// Where a token's visits are among those, `[tokens * active]`.
    places: Vec<i32>,
    /// How many visits each expert has.
    visits: Vec<usize>,
}

impl Routes {
    /// From the experts chosen for each token, `[tokens * active]`.
    fn new(chosen: &[usize], experts: &Experts) -> Self {
        let mut visits = vec![0; experts.count];
        for expert in chosen {
            visits[*expert] += 1;
        }
        let mut next: Vec<usize> = visits
            .iter()
            .scan(0, |sum, count| Some(std::mem::replace(sum, *sum + count)))
            .collect();
        let (mut rows, mut places) = (vec![0; chosen.len()], Vec::with_capacity(chosen.len()));
        for (at, expert) in chosen.iter().enumerate() {
            let place = next[*expert];
            next[*expert] += 1;
            rows[place] = ((at / experts.active) as u32).cast_signed();
            places.push((place as u32).cast_signed());
        }
        Self { rows, places, visits }
    }
}

impl Block {
    /// The experts on the normed residual stream, each on its tokens, weighted by the router.
    ///
    /// # Shapes
    /// - x, result: `[batch, seq, d_model]`
    pub(super) fn mix_experts(
        &self,
        experts: &Experts,
        router: Tensor<2>,
        x: Tensor<3>,
        tap: &Tap<'_>,
    ) -> Tensor<3> {
        let shape @ [batch, seq, d] = x.dims();
        let (tokens, active) = (batch * seq, experts.active);
        let x = x.reshape([tokens, d]);
        // Scores are compared and normalised in f32 whatever the type of the stream.
        let scores = ops::linear(x.clone(), router.transpose()).cast(DType::F32);
        let shares = activation::softmax(scores, 1);
        let (_, chosen) = shares.clone().detach().topk_with_indices(active, 1);
        let mut weights = shares.gather(1, chosen.clone());
        if experts.normalized {
            weights = weights.clone() / weights.sum_dim(1);
        }
        let chosen: Vec<usize> =
            chosen.into_data().iter::<i64>().map(|expert| expert as usize).collect();
        let sent = Routes::new(&chosen, experts);
        let device = x.device();
        let indices = |values: Vec<i32>| {
            let len = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [len]), &device)
        };
        let dtype = x.dtype();
        let sorted = x.select(0, indices(sent.rows));
        let (mut outputs, mut start) = (Vec::new(), 0);
        for (expert, visits) in sent.visits.into_iter().enumerate().filter(|(_, n)| *n > 0) {
            let own = sorted.clone().narrow(0, start, visits);
            outputs.push(self.expert(expert, own.unsqueeze(), tap).reshape([visits, d]));
            start += visits;
        }
        let back = Tensor::cat(outputs, 0).select(0, indices(sent.places));
        let weights = weights.cast(dtype).reshape([tokens, active, 1]);
        (back.reshape([tokens, active, d]) * weights).sum_dim(1).reshape(shape)
    }

    /// One expert's output for its tokens.
    ///
    /// # Shapes
    /// - x, result: `[1, tokens, d_model]`
    pub fn expert(&self, expert: usize, x: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        let x = tap(Site::Expert(expert), x);
        let part = |role| Part(role, Some(expert));
        let gate = self.project(part(Role::Gate), x.clone());
        let inner = gated(self.config.arch.activation, gate, self.project(part(Role::Up), x));
        self.project(part(Role::Down), tap(Site::ExpertOutput(expert), inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_visit_has_a_place() {
        let experts = Experts {
            count: 4,
            active: 2,
            width: 1,
            normalized: true,
            router: "mlp.gate",
            blocks: vec![true],
            linears: Vec::new(),
        };
        // Three tokens; nobody goes to expert 1.
        let chosen = [2, 0, 3, 2, 0, 3];
        let Routes { rows, places, visits } = Routes::new(&chosen, &experts);
        assert_eq!(visits, [2, 0, 2, 2]);
        assert_eq!(rows, [0, 2, 0, 1, 1, 2]);
        assert_eq!(places, [2, 0, 4, 3, 1, 5]);
        for (at, place) in places.iter().enumerate() {
            assert_eq!(rows[place.unsigned_abs() as usize].unsigned_abs() as usize, at / 2);
        }
    }
}

//! Activation quantizers against PyTorch's, on the case `act` of `tests/golden` (its README says how
//! it was made). Values agree within 1e-5 of the tensor's largest magnitude.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use fewbit::quant::{Bits, InputGrid, activation};
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;

const TOLERANCE: f32 = 1e-5;

struct Golden(Checkpoint);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/act.safetensors");
        Self(Checkpoint::open_file(&path).unwrap())
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.0.read(name).unwrap().to_f32().unwrap()
    }

    fn rows(&self, name: &str) -> Tensor<2> {
        let values = self.values(name);
        let shape = [values.len() / 16, 16];
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn agrees<const D: usize>(&self, name: &str, found: Tensor<D>) {
        let expected = self.values(name);
        let found: Vec<f32> = found.into_data().iter::<f32>().collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        let largest = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
            assert!((a - b).abs() <= TOLERANCE * largest, "{name}[{i}]: {a} instead of {b}");
        }
    }
}

#[test]
fn dynamic_grids_of_tokens() {
    let golden = Golden::open();
    for bits in [8, 4] {
        let name = format!("dynamic_b{bits}/x_hat");
        let bits = Bits::new(bits).unwrap();
        golden.agrees(&name, activation::per_token(golden.rows("x"), bits));
        // On the tape the value is the same, and the gradient passes straight through.
        let x = golden.rows("x").autodiff().require_grad();
        let x_hat = activation::per_token(x.clone(), bits);
        golden.agrees(&name, x_hat.clone().inner());
        let upstream = Tensor::from_inner(golden.rows("upstream"));
        let gradients = (x_hat * upstream).sum().backward();
        golden.agrees("upstream", x.grad(&gradients).unwrap());
    }
}

#[test]
fn a_fixed_grid_with_its_gradients() {
    let golden = Golden::open();
    for (folder, bits) in [("static_b8", 8), ("static_b4", 4), ("static_b4_below", 4)] {
        let bits = Bits::new(bits).unwrap();
        let parameter = |name: &str| -> Tensor<1> {
            let data = TensorData::new(golden.values(&format!("{folder}/{name}")), [1]);
            Tensor::from_data(data, &Device::flex()).autodiff().require_grad()
        };
        let (scale, zero) = (parameter("scale"), parameter("zero"));
        let x = golden.rows("x").autodiff().require_grad();
        let x_hat = activation::per_tensor(x.clone(), scale.clone(), zero.clone(), bits);
        golden.agrees(&format!("{folder}/x_hat"), x_hat.clone().inner());
        let upstream = Tensor::from_inner(golden.rows("upstream"));
        let gradients = (x_hat * upstream).sum().backward();
        golden.agrees(&format!("{folder}/grad_x"), x.grad(&gradients).unwrap());
        golden.agrees(&format!("{folder}/grad_scale"), scale.grad(&gradients).unwrap());
        golden.agrees(&format!("{folder}/grad_zero"), zero.grad(&gradients).unwrap());

        let [scale, zero] = ["scale", "zero"].map(|n| golden.values(&format!("{folder}/{n}"))[0]);
        let constant = InputGrid { scale, zero }.apply(golden.rows("x"), bits);
        golden.agrees(&format!("{folder}/x_hat"), constant);
    }
}

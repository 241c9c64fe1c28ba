//! Tensors that PyTorch made (`tests/golden`), and what it means to agree with them.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;

const TOLERANCE: f64 = 1e-5;

/// The tensors of one case, or of one folder in it.
pub(crate) struct Golden {
    file: Checkpoint,
    folder: String,
}

impl Golden {
    pub(crate) fn open(case: &str, folder: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let file = Checkpoint::open_file(&path.join(format!("{case}.safetensors"))).unwrap();
        let folder = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        Self { file, folder }
    }

    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        self.file.read(&format!("{}{name}", self.folder)).unwrap().to_f32().unwrap()
    }

    /// The values as a matrix with rows of `columns`.
    pub(crate) fn matrix(&self, name: &str, columns: usize, device: &Device) -> Tensor<2> {
        let values = self.values(name);
        let shape = [values.len() / columns, columns];
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// `found` equals the golden tensor within `TOLERANCE` of its largest magnitude.
    pub(crate) fn agrees(&self, name: &str, found: &[f32]) {
        self.close(name, found, 0.0);
    }

    /// As [`Golden::agrees`], but relative to 1 where every value is smaller: after 20 steps of
    /// Adam small parameters carry the noise of large ones, and the README allows 1e-5 absolute.
    pub(crate) fn agrees_after_training(&self, name: &str, found: &[f32]) {
        self.close(name, found, 1.0);
    }

    pub(crate) fn bit_equal(&self, name: &str, found: &[f32]) {
        let bits = |values: &[f32]| -> Vec<u32> {
            values.iter().map(|value| (value + 0.0).to_bits()).collect() // -0 is 0
        };
        let expected = self.values(name);
        assert_eq!(bits(found), bits(&expected), "{}{name}: {found:?}, {expected:?}", self.folder);
    }

    /// Within `TOLERANCE` of the largest magnitude, taken to be no smaller than `floor`.
    fn close(&self, name: &str, found: &[f32], floor: f64) {
        let what = format!("{}{name}", self.folder);
        let expected = self.values(name);
        assert_eq!(found.len(), expected.len(), "{what}");
        let largest = expected.iter().fold(floor, |max, value| max.max(f64::from(value.abs())));
        for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
            let gap = (f64::from(*a) - f64::from(*b)).abs();
            assert!(gap <= TOLERANCE * largest, "{what}[{i}]: {a} instead of {b}");
        }
    }
}

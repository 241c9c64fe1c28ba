//! What a whole model does to the activations at its sites, decided above this layer.

use std::fmt;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::Site;

type Function = dyn Fn(usize, Site, Tensor<3>) -> Tensor<3> + Send + Sync;

/// A function of block index, site and activation; the identity by default. Activation and KV-cache
/// fake-quantization come in through it, so the model itself does not know them.
#[derive(Clone, Default)]
pub struct ModelTap(Option<Arc<Function>>);

impl ModelTap {
    /// A tap that applies `function`.
    pub fn new(
        function: impl Fn(usize, Site, Tensor<3>) -> Tensor<3> + Send + Sync + 'static,
    ) -> Self {
        Self(Some(Arc::new(function)))
    }

    /// The activation after the tap, same shape.
    pub fn apply(&self, block: usize, site: Site, x: Tensor<3>) -> Tensor<3> {
        match &self.0 {
            Some(function) => function(block, site, x),
            None => x,
        }
    }
}

impl fmt::Debug for ModelTap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "ModelTap(..)" } else { "ModelTap(none)" })
    }
}

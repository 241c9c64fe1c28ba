//! The bridge to burn: operations with a derivative written by hand, on any backend.
//!
//! An [`Operation`] computes on plain tensors, so it may compose burn's operations or run a kernel
//! of ours; [`apply`] puts it on the tape, where it holds handles of its inputs and whatever it
//! chose to save, and nothing else.

use std::cell::Cell;
use std::fmt::Debug;

#[cfg(feature = "gpu")]
use burn::backend::Cube;
#[cfg(feature = "flex")]
use burn::backend::Flex;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::retro_forward::RetroForward;
use burn::backend::autodiff::checkpoint::state::BackwardStates;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend as _, Backend, BackendTensor, DispatchAutodiffContext,
    DispatchKindConversion, DispatchTensor, DispatchTensorKind, GradientCheckpointingStrategy,
};
use burn::tensor::Tensor;

/// A float tensor off the tape, of any rank.
pub(super) type Plain = DispatchTensor;

/// The rank-`D` view of a plain tensor, and back: no copy, unlike a reshape.
pub(super) fn tensor<const D: usize>(plain: Plain) -> Tensor<D> {
    Tensor::from_dispatch(plain)
}

/// A tensor that an operation only reads, off the tape.
///
/// # Panics
/// When it is tracked: its gradient would be lost without a word.
pub(super) fn frozen<const D: usize>(constant: Tensor<D>) -> Plain {
    assert!(!constant.is_tracked(), "a tracked tensor where an operation gives no gradient");
    off_tape(constant.into_dispatch())
}

/// A tensor's values, off the tape.
pub(super) fn off_tape(tensor: Plain) -> Plain {
    match tensor.autodiff {
        DispatchAutodiffContext::Disabled => tensor,
        // The rank is erased by the way back.
        DispatchAutodiffContext::Enabled(_) => {
            Tensor::<2>::from_dispatch(tensor).inner().into_dispatch()
        }
    }
}

/// An operation of `N` float inputs with its derivative.
pub(super) trait Operation<const N: usize>: Clone + Debug + Send + 'static {
    /// What the forward leaves for the backward, besides its inputs.
    type Saved: Clone + Debug + Send + 'static;

    /// Whether a device that trades time for memory may drop the output and compute it again.
    const CHEAP: bool;

    /// The result.
    fn forward(&self, inputs: [Plain; N]) -> (Plain, Self::Saved);

    /// Gradients of the inputs that want one.
    fn backward(
        &self,
        inputs: [Plain; N],
        saved: Self::Saved,
        gradient: Plain,
        wanted: [bool; N],
    ) -> [Option<Plain>; N];
}

/// The operation's result, on the tape if an input is. All tracked inputs share one strategy of
/// checkpointing.
pub(super) fn apply<O: Operation<N>, const N: usize>(operation: O, inputs: [Plain; N]) -> Plain {
    let strategy = inputs.iter().find_map(|input| match input.autodiff {
        DispatchAutodiffContext::Enabled(strategy) => Some(strategy),
        DispatchAutodiffContext::Disabled => None,
    });
    let Some(strategy) = strategy else { return operation.forward(inputs).0 };
    let kind = inputs.iter().find_map(|input| {
        let DispatchTensorKind::Autodiff(kind) = &input.kind else { return None };
        Some(kind.as_ref())
    });
    let balanced = strategy == GradientCheckpointingStrategy::Balanced;
    match kind {
        #[cfg(feature = "flex")]
        Some(DispatchTensorKind::Flex(_)) if balanced => {
            tracked::<Flex, BalancedCheckpointing, O, N>(operation, inputs)
        }
        #[cfg(feature = "flex")]
        Some(DispatchTensorKind::Flex(_)) => {
            tracked::<Flex, NoCheckpointing, O, N>(operation, inputs)
        }
        #[cfg(feature = "gpu")]
        Some(DispatchTensorKind::Cube(_)) if balanced => {
            tracked::<Cube, BalancedCheckpointing, O, N>(operation, inputs)
        }
        #[cfg(feature = "gpu")]
        Some(DispatchTensorKind::Cube(_)) => {
            tracked::<Cube, NoCheckpointing, O, N>(operation, inputs)
        }
        // Every backend that a feature of this crate enables is named above.
        _ => unreachable!("a tracked tensor on a backend that was not compiled in"),
    }
}

fn tracked<B, C, O, const N: usize>(operation: O, inputs: [Plain; N]) -> Plain
where
    B: Backend,
    C: CheckpointStrategy,
    O: Operation<N>,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    let inputs = inputs.map(|input| match input.autodiff {
        DispatchAutodiffContext::Enabled(_) => primitive::<Autodiff<B, C>>(input),
        DispatchAutodiffContext::Disabled => Autodiff::<B, C>::from_inner(primitive::<B>(input)),
    });
    let plain = inputs.each_ref().map(|input| wrap::<B>(input.primitive().clone()));
    let (output, saved) = operation.forward(plain.clone());
    let output = primitive::<B>(output);
    #[allow(clippy::redundant_closure_for_method_calls)] // the type has no public path
    let nodes = inputs.each_ref().map(|input| input.node());
    let step = Step(operation.clone());
    let prepared = step.prepare::<C>(nodes);
    let prepared = if O::CHEAP {
        let again = Again { operation, inputs: plain.clone(), backend: std::marker::PhantomData };
        prepared.memory_bound().retro_forward::<Again<B, O, N>>(again).parents(&inputs)
    } else {
        prepared.compute_bound()
    };
    let output = match prepared.stateful() {
        OpsKind::Tracked(prepared) => prepared.finish((plain, saved), output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    wrap::<Autodiff<B, C>>(output)
}

fn primitive<B: Backend>(tensor: Plain) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(tensor) {
        Ok(tensor) => tensor.float(),
        // Inputs of one operation share a device; burn's own operations panic here too.
        Err(e) => panic!("tensors of one operation on two devices: {e}"),
    }
}

fn wrap<B: Backend>(tensor: FloatTensor<B>) -> Plain
where
    DispatchTensor: DispatchKindConversion<B>,
{
    <DispatchTensor as DispatchKindConversion<B>>::from_backend(BackendTensor::Float(tensor))
}

/// The backward of an operation.
#[derive(Debug)]
struct Step<O>(O);

impl<B, O, const N: usize> Backward<B, N> for Step<O>
where
    B: Backend,
    O: Operation<N>,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = ([Plain; N], O::Saved);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = wrap::<B>(grads.consume::<B>(&ops.node));
        let (inputs, saved) = ops.state;
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = self.0.backward(inputs, saved, gradient, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, primitive::<B>(gradient));
            }
        }
    }
}

/// The forward of an operation, for devices that drop outputs.
#[derive(Debug)]
struct Again<B, O, const N: usize> {
    operation: O,
    inputs: [Plain; N],
    backend: std::marker::PhantomData<B>,
}

impl<B, O, const N: usize> RetroForward for Again<B, O, N>
where
    B: Backend,
    O: Operation<N>,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (output, _) = self.operation.forward(self.inputs.clone());
        states.save(out, primitive::<B>(output));
    }
}

/// Whether reading a tensor costs nothing: it lies in this machine's memory, in whatever type, on the tape or
/// off it.
pub(super) fn at_hand<const D: usize>(tensor: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    {
        let tensor = tensor.clone().into_dispatch();
        let mut kind = &tensor.kind;
        if let DispatchTensorKind::Autodiff(inner) = kind {
            kind = inner;
        }
        matches!(kind, DispatchTensorKind::Flex(_)) && !COMPOSED.get()
    }
    #[cfg(not(feature = "flex"))]
    {
        let _ = tensor;
        false
    }
}

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread asked for no kernels of ours.
#[cfg(feature = "gpu")]
pub(super) fn is_composed() -> bool {
    COMPOSED.get()
}

/// Runs `f` without any kernel of ours: everything is composed from burn's operations, as on a
/// backend that has no kernels. For tests and measurements; holds for the calling thread.
pub fn composed<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPOSED.set(self.0);
        }
    }
    let _restore = Restore(COMPOSED.replace(true));
    f()
}

#[cfg(feature = "flex")]
pub(super) use flex::{Heads, Rows, fused, in_memory, reads, reads_plain};

#[cfg(feature = "flex")]
mod flex {
    //! Flex tensors as slices.

    use burn::backend::flex::FlexTensor;
    use burn::backend::{DispatchAutodiffContext, DispatchTensorKind, Flex};
    use burn::tensor::{DType, Tensor, TensorData};

    use super::{COMPOSED, Plain, primitive, wrap};

    /// Whether kernels can read this tensor, on the tape or off it: f32 in this machine's memory.
    pub(in crate::ops) fn fused(tensor: &Plain) -> bool {
        lies_here(tensor) && !COMPOSED.get()
    }

    fn lies_here(tensor: &Plain) -> bool {
        use burn::backend::TensorMetadata as _;
        let mut kind = &tensor.kind;
        if let DispatchTensorKind::Autodiff(inner) = kind {
            kind = inner;
        }
        matches!(kind, DispatchTensorKind::Flex(_)) && tensor.dtype() == DType::F32
    }

    /// As [`fused`], of a tensor with its rank.
    pub(in crate::ops) fn reads<const D: usize>(tensor: &Tensor<D>) -> bool {
        fused(&tensor.clone().into_dispatch())
    }

    /// As [`reads`], of a tensor off the tape.
    pub(in crate::ops) fn reads_plain<const D: usize>(tensor: &Tensor<D>) -> bool {
        let plain = tensor.clone().into_dispatch();
        plain.autodiff == DispatchAutodiffContext::Disabled && fused(&plain)
    }

    /// Whether a tensor is f32 in this machine's memory, with kernels or without.
    pub(in crate::ops) fn in_memory<const D: usize>(tensor: &Tensor<D>) -> bool {
        lies_here(&tensor.clone().into_dispatch())
    }

    /// A plain f32 tensor of this machine's memory, row-major.
    #[derive(Clone, Debug)]
    pub(in crate::ops) struct Rows(FlexTensor);

    impl Rows {
        /// Reads a tensor for which [`fused`] holds; copies one that is not contiguous.
        pub(in crate::ops) fn of(tensor: Plain) -> Self {
            debug_assert_eq!(tensor.autodiff, DispatchAutodiffContext::Disabled);
            let tensor = primitive::<Flex>(tensor);
            assert_eq!(tensor.dtype(), DType::F32, "a kernel was given another type");
            Self(if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() })
        }

        /// Whether a plain tensor can be read without a copy.
        pub(in crate::ops) fn is_row_major(tensor: &Plain) -> bool {
            primitive::<Flex>(tensor.clone()).is_contiguous()
        }

        /// New values.
        pub(in crate::ops) fn new(values: Vec<f32>, shape: impl Into<Vec<usize>>) -> Self {
            Self(FlexTensor::from_data(TensorData::new(values, shape.into())))
        }

        /// New values in this shape.
        pub(in crate::ops) fn like(&self, values: Vec<f32>) -> Self {
            Self::new(values, self.shape())
        }

        /// The values.
        pub(in crate::ops) fn values(&self) -> &[f32] {
            // Contiguous and f32 by construction.
            self.0.as_slice().unwrap_or_default()
        }

        /// The values, to be overwritten; copied first if anybody else holds them.
        pub(in crate::ops) fn values_mut(&mut self) -> &mut [f32] {
            let len = self.0.layout().num_elements();
            if self.0.storage::<f32>().len() != len {
                // A view of a part: writing must not touch, or copy, the rest.
                let part = TensorData::new(self.values().to_vec(), self.shape());
                self.0 = FlexTensor::from_data(part);
            }
            self.0.storage_mut()
        }

        /// Dimensions.
        pub(in crate::ops) fn shape(&self) -> Vec<usize> {
            self.0.layout().shape().to_vec()
        }

        /// Dimensions of a matrix.
        pub(in crate::ops) fn matrix(&self) -> [usize; 2] {
            let columns = self.0.layout().shape().last().copied().unwrap_or(1);
            [self.0.layout().num_elements() / columns.max(1), columns]
        }

        /// The tensor.
        pub(in crate::ops) fn plain(self) -> Plain {
            wrap::<Flex>(self.0)
        }
    }

    /// A plain f32 tensor of this machine's memory, `[batch, heads, len, width]`, row-major within each head.
    #[derive(Clone, Debug)]
    pub(in crate::ops) struct Heads(FlexTensor);

    impl Heads {
        /// Reads a tensor for which [`fused`] holds; copies one whose heads are not row-major.
        pub(in crate::ops) fn of(tensor: Plain) -> Self {
            let tensor = primitive::<Flex>(tensor);
            let layout = tensor.layout();
            let width = layout.shape()[3].cast_signed();
            let row_major = layout.strides()[2..] == [width, 1];
            Self(if row_major { tensor } else { tensor.to_contiguous() })
        }

        /// How many there are.
        pub(in crate::ops) fn heads(&self) -> usize {
            self.0.layout().shape()[1]
        }

        /// The values of a head, `[len, width]`.
        pub(in crate::ops) fn head(&self, sequence: usize, head: usize) -> &[f32] {
            let layout = self.0.layout();
            let (shape, strides) = (layout.shape(), layout.strides());
            let [sequence, head] = [sequence, head].map(usize::cast_signed);
            let first =
                layout.start_offset().cast_signed() + sequence * strides[0] + head * strides[1];
            &self.0.storage::<f32>()[first.cast_unsigned()..][..shape[2] * shape[3]]
        }
    }
}

//! The model that a stage trains, and where its parts are while they wait for their turn.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};

use super::depot::{Depot, Kind, Parked};
use super::memory::Memory;
use super::training_state::{PARAMETERS, Snapshot, State};
use crate::error::{Error, Result};
use crate::method;
use crate::model::{Block, CausalLm, Forward, Positions, batches_that_wait};
use crate::ops::{self, Moments};
use crate::quant::ScaleDigits;
use crate::train::{LatentsIn, Optimizer, Role};

/// The model that a stage trains.
#[allow(clippy::large_enum_variant)] // one of them in a stage
pub(super) enum Student {
    /// Whole, with one tape through it.
    Whole(CausalLm),
    /// Block by block.
    ByBlock(Rack),
}

impl Student {
    /// Made of its ends and of what `block` gives, each block at its turn.
    ///
    /// # Errors
    /// Those of `block`, and of the file that blocks wait in.
    pub(super) fn build(
        (memory, latents): (Memory, LatentsIn),
        ends: CausalLm,
        dir: &Path,
        (device, discrete): (&Device, bool),
        block: impl FnMut(usize) -> Result<Block>,
    ) -> Result<Self> {
        let blocks = (0..ends.config.n_blocks).map(block);
        if memory == Memory::Tape {
            return Ok(Self::Whole(CausalLm { blocks: blocks.collect::<Result<_>>()?, ..ends }));
        }
        let bf16 = latents == LatentsIn::Bf16;
        let depot = match memory {
            // Without memory of its own the device's is main memory.
            Memory::Host if discrete => Some(Depot::in_memory()),
            Memory::Disk => Some(Depot::on_disk(dir)?),
            // A block that waits has its latents in two bytes.
            _ if bf16 && !discrete => Some(Depot::in_memory()),
            _ => None,
        };
        let all_wait = discrete || memory == Memory::Disk;
        let (gradients, device) = (HashMap::new(), device.clone());
        let mut rack = Rack { ends, blocks: Vec::new(), depot, all_wait, bf16, gradients, device };
        for (index, block) in blocks.enumerate() {
            rack.blocks.push(None);
            rack.put(index, block?)?;
        }
        Ok(Self::ByBlock(rack))
    }

    /// On the tape.
    #[must_use]
    pub(super) fn train(self) -> Self {
        match self {
            Self::Whole(model) => Self::Whole(model.train()),
            Self::ByBlock(rack) => Self::ByBlock(Rack {
                ends: rack.ends.train(),
                blocks: rack.blocks.into_iter().map(|block| block.map(Module::train)).collect(),
                ..rack
            }),
        }
    }

    /// Embedding, final norm and head; the blocks may come with them.
    pub(super) fn ends(&self) -> &CausalLm {
        match self {
            Self::Whole(model) => model,
            Self::ByBlock(rack) => &rack.ends,
        }
    }

    /// Gives `work` the model off the tape.
    pub(super) fn off_tape<T>(&self, work: impl FnOnce(&dyn Forward) -> T) -> T {
        match self {
            Self::Whole(model) => work(&model.valid()),
            Self::ByBlock(rack) => work(&OffTape { ends: rack.ends.valid(), rack }),
        }
    }

    /// The model off the tape with its weights as they are quantized now; `None` where it is not on the
    /// device whole.
    pub(super) fn whole(&self) -> Option<CausalLm> {
        let (ends, blocks): (_, Vec<Block>) = match self {
            Self::Whole(model) => (model, model.blocks.iter().map(quantized).collect()),
            Self::ByBlock(rack) if rack.depot.is_none() || !rack.all_wait => {
                let block = |index| rack.block(index).map(|block| quantized(&block)).ok();
                (&rack.ends, (0..rack.len()).map(block).collect::<Option<_>>()?)
            }
            Self::ByBlock(_) => return None,
        };
        let ends = CausalLm { blocks: Vec::new(), ..ends.clone() }.valid();
        Some(CausalLm { blocks, ..ends })
    }

    /// Block after block, off the tape.
    ///
    /// # Errors
    /// Those of `visit`; when a block cannot be read.
    pub(super) fn visit_blocks(
        &self,
        mut visit: impl FnMut(usize, &Block) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Whole(model) => {
                model.blocks.iter().enumerate().try_for_each(|(i, block)| visit(i, &block.valid()))
            }
            Self::ByBlock(rack) => (0..rack.blocks.len())
                .try_for_each(|index| visit(index, &rack.block(index)?.valid())),
        }
    }

    /// Scales have as many digits as `digits` from now on.
    pub(super) fn shorten(&mut self, digits: ScaleDigits) {
        // The digits are no tensor: blocks may stay where they are.
        let blocks: Vec<&mut Block> = match self {
            Self::Whole(model) => model.blocks.iter_mut().collect(),
            Self::ByBlock(rack) => rack.blocks.iter_mut().flatten().collect(),
        };
        let linears = blocks.into_iter().flat_map(Block::linears_mut).map(|(_, linear)| linear);
        method::shorten_all(linears, digits);
    }

    /// The state as it is now, beside `facts`. One that waits elsewhere has to be written before it
    /// changes, see [`Student::waits`].
    pub(super) fn snapshot(
        &self,
        optimizer: &Optimizer,
        facts: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Snapshot {
        let state = Snapshot::of_optimizer(optimizer, facts);
        let state = match self {
            Self::Whole(model) => state.with(PARAMETERS, model),
            Self::ByBlock(rack) => {
                (0..rack.blocks.len()).fold(state, |state, index| rack.add_to(state, index))
            }
        };
        state.shortened(|path| optimizer.is_bf16(path))
    }

    /// Lets go of what only further steps would need and that waits elsewhere.
    ///
    /// # Errors
    /// When the file cannot be made shorter.
    pub(super) fn rest(&mut self) -> Result<()> {
        let Self::ByBlock(Rack { depot: Some(depot), .. }) = self else { return Ok(()) };
        depot.drop_all(Kind::Gradients)?;
        depot.drop_all(Kind::Moments)
    }

    /// Whether parts of it are neither on the device nor shared with what is saved.
    pub(super) fn waits(&self) -> bool {
        matches!(self, Self::ByBlock(Rack { depot: Some(_), .. }))
    }

    /// Takes parameters and optimizer state from a saved state.
    ///
    /// # Errors
    /// When they are not those of this student.
    pub(super) fn restore(&mut self, state: &State, optimizer: &mut Optimizer) -> Result<()> {
        match self {
            Self::Whole(model) => {
                let device = model.embed.val().device().inner();
                state.optimizer(optimizer, "", &device)?;
                *model = state.parameters(PARAMETERS, model.clone())?;
                Ok(())
            }
            Self::ByBlock(rack) => rack.restore(state, optimizer),
        }
    }
}

/// A model of which one block at a time is computed with.
pub(super) struct Rack {
    /// Embedding, final norm and head.
    pub ends: CausalLm,
    /// Blocks; without values where those wait in the depot, and none where one is being changed.
    blocks: Vec<Option<Block>>,
    depot: Option<Depot>,
    /// Whether moments and gradients wait there too, and not parameters alone.
    all_wait: bool,
    /// Whether latents are bf16 where they wait.
    bf16: bool,
    /// Gradients that wait on the device.
    gradients: HashMap<usize, GradientsParams>,
    device: Device,
}

impl Rack {
    /// The number of blocks.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// A block, on the device.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn block(&self, index: usize) -> Result<Block> {
        let block = self.blocks[index].clone();
        let block = block.ok_or_else(|| Error::failed(format!("block {index} is gone")))?;
        let Some(depot) = &self.depot else { return Ok(block) };
        let parked = depot.get((index, Kind::Parameters))?.into_iter();
        let parked = parked.map(|parked| (parked.name.clone(), parked)).collect();
        Ok(block.map(&mut Fill { parked, device: &self.device, path: Vec::new() }))
    }

    /// Says that a block comes next.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn ahead(&self, index: Option<usize>) -> Result<()> {
        match (&self.depot, index.filter(|index| *index < self.blocks.len())) {
            (Some(depot), Some(index)) => depot.ahead((index, Kind::Parameters)),
            _ => Ok(()),
        }
    }

    /// Lets go of a block that [`Rack::block`] gave and that is going to change, so that it changes in
    /// place; until [`Rack::put`] there is none.
    pub(super) fn let_go(&mut self, index: usize) {
        self.blocks[index] = None;
    }

    /// Keeps a block.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn put(&mut self, index: usize, block: Block) -> Result<()> {
        let Some(depot) = &mut self.depot else {
            self.blocks[index] = Some(block);
            return Ok(());
        };
        let mut empty = Empty { parked: Vec::new(), path: Vec::new(), bf16: self.bf16 };
        self.blocks[index] = Some(block.map(&mut empty));
        depot.put((index, Kind::Parameters), empty.parked)
    }

    /// Keeps a block's gradients until [`Rack::gradients`] asks for them.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn keep_gradients(
        &mut self,
        index: usize,
        block: &Block,
        gradients: GradientsParams,
    ) -> Result<()> {
        let Some(depot) = self.depot.as_mut().filter(|_| self.all_wait) else {
            self.gradients.insert(index, gradients);
            return Ok(());
        };
        let mut parts =
            ById { gradients, parked: Vec::new(), path: Vec::new(), ids: HashMap::new() };
        block.visit(&mut parts);
        depot.put((index, Kind::Gradients), parts.parked)
    }

    /// What [`Rack::keep_gradients`] kept.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn gradients(&mut self, index: usize, block: &Block) -> Result<GradientsParams> {
        let Some(depot) = self.depot.as_ref().filter(|_| self.all_wait) else {
            return Ok(self.gradients.remove(&index).unwrap_or_default());
        };
        let gradients = GradientsParams::new();
        let mut parts =
            ById { gradients, parked: Vec::new(), path: Vec::new(), ids: HashMap::new() };
        block.visit(&mut parts);
        let mut gradients = GradientsParams::new();
        for parked in depot.get((index, Kind::Gradients))? {
            let Some(id) = parts.ids.get(&parked.name).copied() else { continue };
            match parked.rank() {
                1 => gradients.register(id, parked.tensor::<1>(&self.device)),
                _ => gradients.register(id, parked.tensor::<2>(&self.device)),
            }
        }
        Ok(gradients)
    }

    /// Gives the optimizer its state of a block's parameters.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn moments_to(&self, index: usize, optimizer: &mut Optimizer) -> Result<()> {
        let Some(depot) = self.depot.as_ref().filter(|_| self.all_wait) else { return Ok(()) };
        let mut parts: BTreeMap<String, BTreeMap<&str, Parked>> = BTreeMap::new();
        for parked in depot.get((index, Kind::Moments))? {
            let leaf = ops::LEAVES.into_iter().flatten().find(|leaf| parked.name.ends_with(leaf));
            if let Some((path, leaf)) = leaf.and_then(|l| Some((parked.name.strip_suffix(l)?, l))) {
                parts.entry(path.to_owned()).or_default().insert(leaf, parked);
            }
        }
        for (path, mut parts) in parts {
            let found = moments(&mut parts, &self.device);
            let (moments, rank) = found
                .ok_or_else(|| Error::failed("the optimizer's state is incomplete").at(&path))?;
            optimizer.put_part(path, moments, rank);
        }
        Ok(())
    }

    /// Takes the optimizer's state of a block's parameters.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn moments_from(&mut self, index: usize, optimizer: &mut Optimizer) -> Result<()> {
        let Some(depot) = self.depot.as_mut().filter(|_| self.all_wait) else { return Ok(()) };
        let mut parked = Vec::new();
        for (path, moments, rank) in optimizer.take_part(&format!("blocks.{index}.")) {
            let named = |leaf: &str| format!("{path}{leaf}");
            match (&moments, rank) {
                (Moments::F32(_), 1) => {
                    let both = ops::LEAVES[0].into_iter().zip(moments.tensors::<1>());
                    parked.extend(both.map(|(leaf, moment)| Parked::of(named(leaf), moment)));
                }
                (Moments::F32(_), _) => {
                    let both = ops::LEAVES[0].into_iter().zip(moments.tensors::<2>());
                    parked.extend(both.map(|(leaf, moment)| Parked::of(named(leaf), moment)));
                }
                (Moments::Int8(_), rank) => {
                    for part in moments.parts(rank) {
                        parked.push(Parked::read(named(&part.name), part)?);
                    }
                }
            }
        }
        depot.put((index, Kind::Moments), parked)
    }

    /// A block's part of a state to be saved.
    fn add_to(&self, state: Snapshot, index: usize) -> Snapshot {
        let path = ["blocks", &index.to_string()];
        let Some(block) = &self.blocks[index] else { return state };
        let Some(depot) = &self.depot else {
            return state.with_part(PARAMETERS, &path, block);
        };
        let state = state.with_moments(depot.later((index, Kind::Moments)));
        state.with_waiting(PARAMETERS, &path, block, depot.later((index, Kind::Parameters)))
    }

    fn restore(&mut self, state: &State, optimizer: &mut Optimizer) -> Result<()> {
        let mut known = 0;
        for index in 0..self.blocks.len() {
            let block = self.block(index)?;
            let (block, found) = state.part(PARAMETERS, &["blocks", &index.to_string()], block)?;
            known += found;
            self.put(index, block)?;
            state.optimizer(optimizer, &format!("blocks.{index}."), &self.device)?;
            self.moments_from(index, optimizer)?;
        }
        if state.count(PARAMETERS) == known {
            return Ok(());
        }
        Err(state.foreign("nothing learns some of its parameters"))
    }
}

/// A model by block off the tape.
struct OffTape<'a> {
    ends: CausalLm,
    rack: &'a Rack,
}

impl Forward for OffTape<'_> {
    fn ends(&self) -> &CausalLm {
        &self.ends
    }

    fn streams(&self, batches: Vec<(Tensor<2, Int>, &Positions)>) -> Result<Vec<Tensor<3>>> {
        let Self { ends, rack } = self;
        let embedded = batches.into_iter().map(|(tokens, at)| (ends.embed(tokens, at), at));
        let mut streams: Vec<_> = embedded.collect();
        for index in 0..rack.blocks.len() {
            let block = quantized(&rack.block(index)?);
            rack.ahead(Some(index + 1))?;
            let tap = |site, x| ends.tap.apply(index, site, x);
            let forward = |(hidden, at)| (block.forward_tapped(hidden, at, None, &tap), at);
            streams = streams.into_iter().map(forward).collect();
        }
        Ok(streams.into_iter().map(|(hidden, _)| ends.finish(hidden)).collect())
    }

    fn batches_at_once(&self, tokens: usize) -> usize {
        batches_that_wait(&self.ends.config, self.ends.dtype(), tokens)
    }
}

/// A block off the tape with its weights as they are quantized now: computed once, whatever the number
/// of batches.
pub(super) fn quantized(block: &Block) -> Block {
    let mut block = block.valid();
    for (_, linear) in block.linears_mut() {
        if method::attached(&linear.weight).is_some() {
            linear.weight = Param::initialized(linear.weight.id, linear.weight.val());
        }
    }
    block
}

/// A parameter's moments, with its rank.
fn moments(parts: &mut BTreeMap<&str, Parked>, device: &Device) -> Option<(Moments, usize)> {
    let [first, second] = ops::LEAVES[0];
    let Some(first) = parts.remove(first) else {
        return Moments::from_parts(|leaf| parts.remove(leaf).map(Parked::into_data), device);
    };
    let (second, rank) = (parts.remove(second)?, first.rank());
    let moments = match rank {
        1 => Moments::new(first.tensor::<1>(device), second.tensor::<1>(device)),
        _ => Moments::new(first.tensor::<2>(device), second.tensor::<2>(device)),
    };
    Some((moments, rank))
}

/// Takes the values out of a module.
struct Empty {
    parked: Vec<Parked>,
    path: Vec<String>,
    /// Whether latents are kept in bf16.
    bf16: bool,
}

impl ModuleMapper for Empty {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        let learned = value.is_require_grad();
        let taped = value.device().is_autodiff();
        let value = if taped { value.inner() } else { value };
        let nothing = Tensor::<D>::zeros([0; D], &value.device());
        let path = self.path.join(".");
        // Before a training begins nothing learns yet, and is to lie where it will.
        let bf16 = self.bf16 && method::role_of(&path) == Some(Role::Weight);
        self.parked.push(if bf16 { Parked::of_bf16(path, value) } else { Parked::of(path, value) });
        let nothing = if taped { Tensor::from_inner(nothing) } else { nothing };
        let nothing = if learned { nothing.require_grad() } else { nothing };
        Param::from_mapped_value(id, nothing, mapper)
    }
}

/// Puts them back.
struct Fill<'a> {
    parked: HashMap<String, Parked>,
    device: &'a Device,
    path: Vec<String>,
}

impl ModuleMapper for Fill<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(parked) = self.parked.remove(&self.path.join(".")) else { return param };
        let (id, nothing, mapper) = param.consume();
        let value = parked.tensor::<D>(self.device);
        let value = if nothing.device().is_autodiff() { Tensor::from_inner(value) } else { value };
        let value = if nothing.is_require_grad() { value.require_grad() } else { value };
        Param::from_mapped_value(id, value, mapper)
    }
}

/// A module's gradients by path, and its parameters' ids.
struct ById {
    gradients: GradientsParams,
    parked: Vec<Parked>,
    path: Vec<String>,
    ids: HashMap<String, ParamId>,
}

impl ModuleVisitor for ById {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.parked.push(Parked::of(path.clone(), gradient));
        }
        self.ids.insert(path, param.id);
    }
}

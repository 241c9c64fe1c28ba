//! The float model that a student is compared with.

use super::context::StageContext;
use super::memory::Memory;
use crate::error::Result;
use crate::model::{ByBlock, CausalLm, Forward, Loader, ModelTap};

/// The float model, as an earlier stage may have fine-tuned it.
pub(super) struct Teacher {
    /// The whole model, or its ends alone.
    model: CausalLm,
    /// Whether blocks are read when they are needed.
    read: bool,
}

impl Teacher {
    /// What there is room for: the whole model, or its ends. Those are `student`'s where nothing has made
    /// them others.
    ///
    /// # Errors
    /// When weights cannot be read.
    pub(super) fn new(ctx: &StageContext<'_>, memory: Memory, student: &CausalLm) -> Result<Self> {
        let source = &ctx.model.tuned_on(ctx.model.float()?);
        let (config, device) = (&ctx.model.config, &ctx.device.device);
        let loader = Loader { config, source, device, dtype: ctx.compute };
        let ends = if ctx.model.has_float_ends() {
            let ends = CausalLm { blocks: Vec::new(), ..student.clone() };
            ends.with_tap(ModelTap::default())
        } else {
            loader.ends()?
        };
        let read = matches!(memory, Memory::Host | Memory::Disk);
        if read {
            return Ok(Self { model: ends, read });
        }
        let blocks = (0..config.n_blocks).map(|index| loader.block(index));
        Ok(Self { model: CausalLm { blocks: blocks.collect::<Result<_>>()?, ..ends }, read })
    }

    /// Embedding, final norm and head.
    pub(super) fn ends(&self) -> &CausalLm {
        &self.model
    }

    /// Gives `work` what computes its hidden states.
    ///
    /// # Errors
    /// Those of `work`.
    pub(super) fn with<T>(
        &self,
        ctx: &StageContext<'_>,
        work: impl FnOnce(&dyn Forward) -> Result<T>,
    ) -> Result<T> {
        if !self.read {
            return work(&self.model);
        }
        let source = &ctx.model.tuned_on(ctx.model.float()?);
        let (config, device) = (&ctx.model.config, &ctx.device.device);
        let loader = Loader { config, source, device, dtype: ctx.compute };
        work(&ByBlock::between(loader, self.model.clone()))
    }
}

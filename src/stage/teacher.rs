//! The float model that a student is compared with.

use super::context::StageContext;
use super::memory::Memory;
use crate::error::Result;
use crate::model::{ByBlock, CausalLm, Forward, Loader};

/// The float model, as an earlier stage may have fine-tuned it.
pub(super) struct Teacher {
    /// The whole model, or its ends alone.
    model: CausalLm,
    /// Whether blocks are read when they are needed.
    read: bool,
}

impl Teacher {
    /// What there is room for: the whole model, or its ends.
    ///
    /// # Errors
    /// When weights cannot be read.
    pub(super) fn new(ctx: &StageContext<'_>, memory: Memory) -> Result<Self> {
        let source = &ctx.model.tuned_on(ctx.model.float()?);
        let (config, device) = (&ctx.model.config, &ctx.device.device);
        let loader = Loader { config, source, device, dtype: ctx.compute };
        let read = matches!(memory, Memory::Host | Memory::Disk);
        let model = if read { loader.ends()? } else { loader.model()? };
        Ok(Self { model, read })
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

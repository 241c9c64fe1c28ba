//! OLMo 3: OLMo 2 with a window in three layers of four, where rotations are not stretched.

use super::{Keys, MAX_ROWS, ModelConfig, Result, local_rope, olmo2, windows};

/// Base of the frequencies where a config is silent.
const THETA: f64 = 500_000.0;

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = olmo2::read_with(keys, THETA)?;
    let window = keys.count(&["sliding_window"], MAX_ROWS)?.unwrap_or(4096);
    windows(keys, &mut config, Some(window), |index| (index + 1) % 4 != 0)?;
    let theta = config.arch.spans[0].rope.as_ref().map_or(THETA, |rope| rope.theta);
    local_rope(keys, &mut config, theta)?;
    config.arch.gguf = None;
    Ok(config)
}

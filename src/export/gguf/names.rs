//! Names of tensors: the Hugging Face layout's and a file's.

use crate::model::ModelConfig;

/// The name in a GGUF file of a tensor of the Hugging Face layout; `None` for one that the family does
/// not have.
pub(super) fn tensor_name(name: &str, config: &ModelConfig) -> Option<String> {
    let (base, part) = name.rsplit_once('.')?;
    if part != "weight" && part != "bias" {
        return None;
    }
    let (gguf, names) = (config.arch.gguf?, &config.arch.names);
    let biased = config.arch.norm.vectors() == 2;
    if base == config.head() {
        return (part == "weight" || names.head_bias).then(|| format!("output.{part}"));
    }
    let Some((block, inner)) = config.inner(base) else {
        let top = base.strip_prefix(names.root)?;
        let positions = config.arch.positions.as_ref().map(|table| table.name);
        return match top {
            _ if top == names.embedding && part == "weight" => Some("token_embd.weight".to_owned()),
            _ if Some(top) == positions && part == "weight" => {
                Some("position_embd.weight".to_owned())
            }
            _ if Some(top) == names.norm && (part == "weight" || biased) => {
                Some(format!("output_norm.{part}"))
            }
            _ => None,
        };
    };
    // All experts' matrices of one kind are one tensor.
    let stacked = config.linear(inner).and_then(|spec| spec.expert);
    let inner = match stacked {
        Some(expert) => inner.replace(&format!(".{expert}."), "."),
        None => inner.to_owned(),
    };
    let (_, theirs) = gguf.parts().find(|(ours, _)| *ours == inner)?;
    Some(format!("blk.{block}.{theirs}.{part}"))
}

/// The place of a matrix in the tensor that it is stored in, and how many are there: of an expert's.
pub(super) fn part_of(name: &str, config: &ModelConfig) -> Option<(usize, usize)> {
    let (base, _) = name.rsplit_once('.')?;
    let (block, inner) = config.inner(base)?;
    let expert = config.linear(inner)?.expert?;
    Some((expert, config.experts(block)?.count))
}

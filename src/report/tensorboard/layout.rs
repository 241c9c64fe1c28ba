//! The page that TensorBoard opens under Custom Scalars: what matters first, and what is told block by
//! block as one chart of as many lines.
//!
//! Field numbers are those of TensorBoard's layout.proto.

use prost::{Message, Oneof};

use super::events::Value;

/// Where TensorBoard looks for it.
const TAG: &str = "custom_scalars__config__";

#[derive(Clone, Message, PartialEq)]
struct Layout {
    #[prost(message, repeated, tag = "2")]
    category: Vec<Category>,
}

#[derive(Clone, Message, PartialEq)]
struct Category {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(message, repeated, tag = "2")]
    chart: Vec<Chart>,
    /// Whether it has to be opened by hand.
    #[prost(bool, tag = "3")]
    closed: bool,
}

#[derive(Clone, Message, PartialEq)]
struct Chart {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(oneof = "Content", tags = "2")]
    content: Option<Content>,
}

#[derive(Clone, Oneof, PartialEq)]
enum Content {
    #[prost(message, tag = "2")]
    Lines(Lines),
}

#[derive(Clone, Message, PartialEq)]
struct Lines {
    /// Regular expressions that the beginning of a tag is matched with.
    #[prost(string, repeated, tag = "1")]
    tag: Vec<String>,
}

/// A title, and the tags of its lines.
type Lined = (&'static str, &'static [&'static str]);

/// Categories, whether they are closed, and their charts.
const PAGE: [(&str, bool, &[Lined]); 4] = [
    (
        "Overview",
        false,
        &[
            ("loss", &["train/loss"]),
            ("perplexity on the validation text", &["eval/perplexity"]),
            ("KL from the teacher, on the validation text", &["eval/kl_forward"]),
            ("learning rate", &["train/learning_rate"]),
            ("gradient norm", &["train/grad_norm"]),
            ("share of codes that a step changed", &["codes/flipped"]),
            ("block error before and after, by block", &["block/mse_(before|after)"]),
        ],
    ),
    (
        "Closeness to the teacher, in training",
        true,
        &[
            ("KL", &["distill/kl_(forward|reverse)"]),
            ("Jensen-Shannon divergence", &["distill/jsd"]),
            (
                "share of tokens that both find likeliest",
                &["distill/top1_agreement", "eval/top1_agreement"],
            ),
            ("loss on the validation text", &["eval/loss"]),
        ],
    ),
    (
        "Block by block",
        true,
        &[
            ("loss inside each block", &[r"block/\d+/loss"]),
            ("gradient norm of each block", &[r"grad_norm/block_\d+"]),
            ("update norm of each block", &[r"update_norm/block_\d+"]),
            ("share of codes that are no longer the start's", &["codes/changed"]),
            ("relative change of scales since the start", &["scales/changed"]),
        ],
    ),
    (
        "Machine",
        true,
        &[
            ("tokens per second", &["perf/tokens_per_second"]),
            ("seconds left in the stage", &["perf/seconds_left"]),
            ("memory, GiB", &["memory/(peak|device)_gib"]),
            ("share of the time that waits for data", &["perf/data_wait_fraction"]),
        ],
    ),
];

/// The page as TensorBoard reads it.
pub(super) fn layout() -> Value {
    let chart = |(title, tags): &Lined| {
        // A match need not reach the end of a tag by itself.
        let tag = tags.iter().map(|tag| format!("{tag}$")).collect();
        Chart { title: (*title).to_owned(), content: Some(Content::Lines(Lines { tag })) }
    };
    let category = |(title, closed, charts): &(&str, bool, &[Lined])| Category {
        title: (*title).to_owned(),
        chart: charts.iter().map(chart).collect(),
        closed: *closed,
    };
    let layout = Layout { category: PAGE.iter().map(category).collect() };
    Value::strings(TAG, "custom_scalars", Vec::new(), vec![layout.encode_to_vec()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tensorboard::events::Shown;

    #[test]
    fn the_layout_is_one_string_without_a_shape() {
        let value = layout();
        let Some(Shown::Tensor(tensor)) = value.shown else { panic!() };
        assert_eq!((tensor.dtype, tensor.shape.unwrap().dim.len()), (7, 0));
        let layout = Layout::decode(&tensor.strings[0][..]).unwrap();
        assert_eq!(layout.category.len(), PAGE.len());
        assert_eq!(layout.category.iter().filter(|category| !category.closed).count(), 1);
        let Some(Content::Lines(lines)) = &layout.category[0].chart[0].content else { panic!() };
        assert_eq!(lines.tag, ["train/loss$"]);
        assert_eq!(value.metadata.unwrap().plugin.unwrap().name, "custom_scalars");
    }
}

//! Events, and their lines in a width.

use super::line;
use crate::report::{Event, Number};

pub(super) fn block(index: usize, of: usize, seconds: f64) -> Event {
    Event::Block {
        stage: 0,
        index,
        of,
        verb: "reconstruct".into(),
        mse_before: 4.11e-4,
        mse_after: 9.02e-5,
        steps: 5000,
        seconds,
        memory_gib: Some(2.98),
    }
}

pub(super) fn needs() -> Event {
    Event::Needs {
        device: "cuda:0".into(),
        device_bytes: Some(5_100_000_000),
        host_bytes: 3_900_000_000,
        disk_bytes: 7_400_000_000,
        seconds: 7800.0,
    }
}

pub(super) fn step(step: u64) -> Event {
    Event::Step {
        stage: 1,
        verb: "distill".into(),
        step,
        of: 2000,
        global_step: step,
        values: vec![
            ("train/loss".into(), 2.314_15),
            ("train/learning_rate".into(), 2e-5),
            ("train/grad_norm".into(), 0.5),
            ("perf/tokens_per_second".into(), 1234.4),
            ("perf/data_wait_fraction".into(), 0.031),
            ("memory/peak_gib".into(), 2.98),
        ],
    }
}

pub(super) fn numbers(perplexity: f64) -> Vec<Number> {
    let number =
        |name: &str, tag: &str, value| Number { name: name.into(), tag: tag.into(), value };
    vec![
        number("perplexity", "eval/perplexity", perplexity),
        number("nll_per_token", "eval/loss", 2.787),
    ]
}

pub(super) fn marks(marks: &[[&str; 2]]) -> Vec<[String; 2]> {
    marks.iter().map(|mark| mark.map(str::to_owned)).collect()
}

pub(super) fn evaluation() -> Event {
    Event::Evaluation {
        stage: 2,
        what: "after reconstruct".into(),
        task: "ppl".into(),
        numbers: numbers(16.234),
        tokens: 128_000,
        protocol: serde_json::Map::new(),
        marks: marks(&[["context 2048", "ctx 2048"]]),
        bos: true,
        data: "data/validation.jsonl".into(),
        ratio_to_float: Some(1.168),
        global_step: 10,
        track: true,
    }
}

pub(super) fn done() -> Event {
    Event::Done {
        run: "runs/upq_int2".into(),
        perplexity_float: Some(13.9),
        perplexity_final: Some(16.21),
        slice_tokens: None,
        bytes: Some(612_000_000),
        bits_per_weight: Some(2.63),
        codes_exact: true,
        seconds: 1080.0,
    }
}

pub(super) fn at(event: &Event, width: usize) -> String {
    let text = line(event, width).unwrap();
    assert!(text.lines().all(|l| l.chars().count() <= width), "over {width}: {text}");
    text
}

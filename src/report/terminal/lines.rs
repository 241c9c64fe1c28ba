//! The text of an event.

use super::ending::ending;
use super::layout::{Field, clean, fit, labelled, positioned, wrap};
use crate::report::numbers::{brief, compact, memory, significant, tiny};
use crate::report::{Event, duration, size};

/// The text of an event in at most `width` columns: one line, except that a plan, a note or a
/// warning goes on in further, indented lines. `None` for events that have no line.
pub fn line(event: &Event, width: usize) -> Option<String> {
    Some(match event {
        Event::Plan { text } => wrap("plan", text, width),
        Event::Note { text } => wrap("note", text, width),
        Event::Warning { text } => wrap("warning", text, width),
        Event::Resumed { stage, position, .. } => {
            fit(&labelled("resumed", stage), &[Field::new(position)], width)
        }
        Event::StageStart { stage, of, name } => {
            fit(&Field::new(&positioned("stage", *stage as u64 + 1, *of as u64, name)), &[], width)
        }
        Event::StageEnd { stage, of, name, seconds } => {
            let head = positioned("stage", *stage as u64 + 1, *of as u64, name);
            fit(&Field::new(&format!("{head}  done")), &[Field::new(&duration(*seconds))], width)
        }
        Event::Step { verb, step, of, values, .. } => {
            let mut values = values.iter().map(|(tag, v)| value(tag, *v));
            let head = positioned("step", *step, *of, verb);
            let head = format!("{head}  {}", values.next().unwrap_or_default());
            let fields: Vec<Field> = values.map(|text| Field::new(&text)).collect();
            fit(&Field::new(&head), &fields, width)
        }
        Event::Model { .. } | Event::Needs { .. } => opening(event, width)?,
        Event::Block { .. } | Event::Evaluation { .. } => result(event, width)?,
        Event::Validation { .. } | Event::Retry { .. } | Event::Gate { .. } => {
            health(event, width)?
        }
        Event::Exported { .. } | Event::Done { .. } => ending(event, width)?,
        // The screen has it from whoever called the run.
        Event::Failed { told, .. } => format!("error: {told}"),
        Event::BlockLoss { .. }
        | Event::Saved { .. }
        | Event::Progress { .. }
        | Event::Details { .. }
        | Event::Histogram { .. }
        | Event::Settings { .. }
        | Event::Text { .. } => return None,
    })
}

/// What a line says of the best state so far.
const BEST: &str = "best";

/// Lines printed once, before the work.
fn opening(event: &Event, width: usize) -> Option<String> {
    match event {
        Event::Model { name, blocks, quantized, kept } => {
            let mut fields = vec![
                Field::new(&format!("{blocks} blocks")),
                Field::new(&format!("{quantized} linears quantized"))
                    .or(&format!("{quantized} quantized")),
            ];
            if !kept.is_empty() {
                let count = format!("{} kept", kept.len());
                fields.push(Field::new(&format!("{count} ({})", kept.join(", "))).or(&count));
            }
            Some(fit(&labelled("model", name), &fields, width))
        }
        Event::Needs { device, device_bytes, host_bytes, disk_bytes, seconds } => {
            let mut amounts: Vec<String> =
                device_bytes.iter().map(|bytes| format!("{} VRAM", size(*bytes))).collect();
            amounts.push(format!("{} RAM", size(*host_bytes)));
            amounts.push(format!("{} disk", size(*disk_bytes)));
            let time = duration(*seconds);
            let mut fields: Vec<Field> = amounts[1..].iter().map(|text| Field::new(text)).collect();
            let about = format!("about {time}");
            fields.push(Field::new(&format!("{about} on {device}")).or(&about));
            Some(fit(&labelled("needs", &amounts[0]), &fields, width))
        }
        _ => None,
    }
}

/// Lines about a block or a measurement.
fn result(event: &Event, width: usize) -> Option<String> {
    match event {
        Event::Block {
            index, of, verb, mse_before, mse_after, steps, seconds, memory_gib, ..
        } => {
            let head = positioned("block", *index as u64 + 1, *of as u64, verb);
            let (before, after) = (tiny(*mse_before), tiny(*mse_after));
            let mut fields = vec![
                Field::new(&format!("{steps:>4} steps")),
                Field::new(&format!("{:>6}", brief(*seconds))),
            ];
            fields.extend(memory_gib.map(|gib| {
                let text = memory(gib);
                Field::new(&text).or(text.trim_start_matches("mem "))
            }));
            Some(fit(&Field::new(&format!("{head}  mse {before:>7} → {after:<7}")), &fields, width))
        }
        Event::Evaluation {
            what, task, numbers, tokens, marks, bos, data, ratio_to_float, ..
        } => {
            let first = numbers.first()?;
            let value = significant(first.value, 4);
            let error = format!("{}_stderr", first.name);
            let error = numbers.iter().find(|number| number.name == error);
            // A perplexity's name says what was measured; an accuracy's does not.
            let name = match error {
                Some(_) => format!("{task} {}", first.name),
                None => first.name.clone(),
            };
            let head = labelled("eval", &format!("{what:<17}  {name} {value:<6}"));
            let ratio =
                ratio_to_float.map_or(String::new(), |r| format!("{}× float", significant(r, 4)));
            let mut fields = Vec::new();
            fields.extend(error.map(|e| Field::new(&format!("± {}", significant(e.value, 2)))));
            fields.push(Field::new(&format!("{ratio:<12}")));
            if error.is_none() {
                let short = format!("{} tok", compact(*tokens));
                fields.push(Field::new(&format!("{tokens} tokens")).or(&short));
            }
            fields.extend(marks.iter().map(|[long, short]| Field::new(long).or(short)));
            if !bos {
                fields.push(Field::new("no BOS"));
            }
            fields.push(Field::path(data));
            Some(fit(&head, &fields, width))
        }
        _ => None,
    }
}

/// Lines about how a training is doing.
fn health(event: &Event, width: usize) -> Option<String> {
    match event {
        Event::Validation {
            verb, step, of, perplexity, kl_forward, top1_agreement, best, ..
        } => {
            let head = positioned("val ", *step, *of, verb);
            let head = format!("{head}  perplexity {:<7}", significant(*perplexity, 4));
            let mut fields = Vec::new();
            fields
                .extend(kl_forward.map(|kl| Field::new(&format!("kl {:<7}", significant(kl, 4)))));
            fields.extend(
                top1_agreement.map(|top1| Field::new(&format!("top1 {:<7}", significant(top1, 4)))),
            );
            fields.push(Field::new(BEST));
            let text = fit(&Field::new(&head), &fields, width);
            // Lines with the word and lines without it have the same columns.
            let without = text.strip_suffix(BEST).filter(|_| !best).map(str::trim_end);
            Some(without.map(str::to_owned).unwrap_or(text))
        }
        Event::Retry { verb, step, back_to, reason, rate_factor, attempt, of, .. } => {
            let text = format!(
                "{verb} failed at step {step}: {reason}; it goes back to step {back_to} with {} \
                 times the rate (retry {attempt} of {of})",
                significant(*rate_factor, 3)
            );
            Some(wrap("warning", &text, width))
        }
        Event::Gate { what, perplexity, start, rtn, tokens, passed, .. } => {
            let number = |value: f64| significant(value, 4);
            let head = format!("{what:<17}  perplexity {:<7}", number(*perplexity));
            let mut fields = Vec::new();
            fields.push(Field::new(if *passed { "passed" } else { "worse " }));
            fields.extend(start.map(|v| Field::new(&format!("start {}", number(v)))));
            fields.extend(rtn.map(|v| {
                Field::new(&format!("plain rounding {}", number(v)))
                    .or(&format!("rtn {}", number(v)))
            }));
            fields.push(Field::new(&format!("{tokens} tokens")).or(&format!("{tokens} tok")));
            Some(fit(&labelled("gate", &head), &fields, width))
        }
        _ => None,
    }
}

/// One value of a training step, as wide as its kind.
pub(super) fn value(tag: &str, value: f64) -> String {
    let label = match tag {
        "perf/tokens_per_second" => return format!("{value:>5.0} tok/s"),
        "perf/data_wait_fraction" => return format!("wait {:>2.0}%", value * 100.0),
        "memory/peak_gib" => return memory(value),
        "memory/device_gib" => return format!("device {}", memory(value)),
        "train/learning_rate" => "lr",
        "train/grad_norm" => "grad",
        "distill/top1_agreement" => "top1",
        _ => tag.rsplit('/').next().unwrap_or(tag),
    };
    clean(&format!("{label} {:<7}", significant(value, 4)))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{at, block, done, evaluation, marks, needs, numbers, step};
    use super::*;

    #[test]
    fn opening_lines() {
        let plan = "dense → reconstruct(flexround, w4) → distill(seq, w2, jsd 0.5) → evaluate → \
                    export(gguf)";
        let plan = Event::Plan { text: plan.into() };
        assert_eq!(
            at(&plan, 120),
            "plan      dense → reconstruct(flexround, w4) → distill(seq, w2, jsd 0.5) → evaluate → \
             export(gguf)"
        );
        assert_eq!(
            at(&plan, 80),
            "plan      dense → reconstruct(flexround, w4) → distill(seq, w2, jsd 0.5) →\n          \
             evaluate → export(gguf)"
        );
        let model = Event::Model {
            name: "Llama-3.2-1B-Instruct".into(),
            blocks: 16,
            quantized: 112,
            kept: vec!["embed".into(), "head".into()],
        };
        assert_eq!(
            at(&model, 120),
            "model     Llama-3.2-1B-Instruct   16 blocks   112 linears quantized   \
             2 kept (embed, head)"
        );
        assert_eq!(
            at(&model, 80),
            "model     Llama-3.2-1B-Instruct  16 blocks  112 quantized  2 kept"
        );
        assert_eq!(
            at(&needs(), 80),
            "needs     5.1 GB VRAM   3.9 GB RAM   7.4 GB disk   about 2 h 10 min on cuda:0"
        );
        let resumed = Event::Resumed {
            stage: "distill".into(),
            position: "step 12/20".into(),
            mark: String::new(),
        };
        assert_eq!(at(&resumed, 80), "resumed   distill   step 12/20");
    }

    #[test]
    fn block_and_stage_lines() {
        assert_eq!(
            at(&block(0, 16, 61.0), 80),
            "block  1/16  reconstruct  mse 4.11e-4 → 9.02e-5  5000 steps    61 s  mem 3.20 GB"
        );
        assert_eq!(
            at(&block(15, 16, 9.0), 80),
            "block 16/16  reconstruct  mse 4.11e-4 → 9.02e-5  5000 steps   9.0 s  mem 3.20 GB"
        );
        assert_eq!(
            at(&block(1, 2, 7800.0), 120),
            "block  2/2   reconstruct  mse 4.11e-4 → 9.02e-5   5000 steps    2.2 h   mem 3.20 GB"
        );
        let start = Event::StageStart { stage: 1, of: 4, name: "distill".into() };
        assert_eq!(at(&start, 80), "stage  2/4   distill");
        let end = Event::StageEnd { stage: 1, of: 4, name: "distill".into(), seconds: 1080.0 };
        assert_eq!(at(&end, 80), "stage  2/4   distill      done   18 min");
    }

    #[test]
    fn step_and_evaluation_lines() {
        assert_eq!(
            at(&step(100), 80),
            "step  100/2000  distill      loss 2.314    lr 2.00e-5  grad 0.5000    1234 tok/s"
        );
        assert_eq!(
            at(&step(100), 120),
            "step  100/2000  distill      loss 2.314     lr 2.00e-5   grad 0.5000     1234 tok/s   \
             wait  3%   mem 3.20 GB"
        );
        assert_eq!(
            at(&evaluation(), 80),
            "eval      after reconstruct  perplexity 16.23   1.168× float  128k tok  ctx 2048"
        );
        let float = Event::Evaluation {
            stage: 2,
            what: "float".into(),
            task: "ppl".into(),
            numbers: numbers(16.234),
            tokens: 128_000,
            protocol: serde_json::Map::new(),
            marks: marks(&[["context 2048", "ctx 2048"], ["stride 1024", "stride 1024"]]),
            bos: false,
            data: "a.txt".into(),
            ratio_to_float: None,
            global_step: 0,
            track: false,
        };
        assert_eq!(
            at(&float, 120),
            "eval      float              perplexity 16.23                 128000 tokens  \
             context 2048  stride 1024  no BOS  a.txt"
        );
        let mut hopeless = evaluation();
        if let Event::Evaluation { numbers: found, ratio_to_float, .. } = &mut hopeless {
            (*found, *ratio_to_float) = (numbers(3.7e32), Some(2.17e31));
        }
        assert_eq!(
            at(&hopeless, 80),
            "eval      after reconstruct  perplexity 3.70e32  2.17e31× float  128k tok"
        );
        let mut packed = evaluation();
        if let Event::Evaluation { marks, data, .. } = &mut packed {
            marks.push(["completions only".into(), "completions".into()]);
            *data = "a.jsonl".into();
        }
        assert_eq!(
            at(&packed, 120),
            "eval      after reconstruct  perplexity 16.23   1.168× float  128000 tokens  \
             context 2048  completions only  a.jsonl"
        );
    }

    #[test]
    fn health_lines() {
        let validation = |perplexity, kl_forward, best| Event::Validation {
            stage: 1,
            verb: "distill".into(),
            step: 100,
            of: 2000,
            global_step: 100,
            perplexity,
            nll_per_token: 2.787,
            kl_forward,
            top1_agreement: kl_forward.map(|_| 0.51234),
            tokens: 1020,
            best,
        };
        assert_eq!(
            at(&validation(16.234, Some(0.5), true), 80),
            "val   100/2000  distill      perplexity 16.23    kl 0.5000   top1 0.5123   best"
        );
        assert_eq!(
            at(&validation(16.234, Some(0.5), false), 80),
            "val   100/2000  distill      perplexity 16.23    kl 0.5000   top1 0.5123"
        );
        assert_eq!(
            at(&validation(3.7e32, None, true), 80),
            "val   100/2000  distill      perplexity 3.70e32   best"
        );
        let gate = Event::Gate {
            stage: 1,
            what: "after distill".into(),
            perplexity: 51.2,
            start: Some(4.53e7),
            rtn: Some(1012.3),
            tokens: 1020,
            passed: true,
        };
        assert_eq!(
            at(&gate, 80),
            "gate      after distill      perplexity 51.20    passed  start 4.53e7  rtn 1012"
        );
        let retry = Event::Retry {
            stage: 1,
            verb: "distill".into(),
            step: 43,
            back_to: 20,
            global_step: 20,
            reason: "the loss became NaN".into(),
            rate_factor: 0.25,
            attempt: 2,
            of: 3,
        };
        assert_eq!(
            at(&retry, 80),
            "warning   distill failed at step 43: the loss became NaN; it goes back to step\n          \
             20 with 0.250 times the rate (retry 2 of 3)"
        );
    }

    #[test]
    fn stays_inside_any_width() {
        for event in [block(0, 128, 9000.0), needs(), step(7), evaluation(), done()] {
            for width in 40..130 {
                at(&event, width);
            }
        }
        let note = Event::Note { text: format!("see\n{}\x1b[2J", "x/".repeat(80)) };
        let text = at(&note, 60);
        assert_eq!(text.matches('x').count(), 80);
        assert!(!text.contains('\x1b'));
    }
}

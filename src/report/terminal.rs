//! Aligned lines on stderr, and a bar where stderr is a terminal.
//!
//! Position first, verb next, numbers in the same columns each time. Lines are shortened to the
//! width (`COLUMNS`, else 80 on a terminal and 120 elsewhere), never left for the terminal to wrap.

use std::env;
use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Event, Reporter, Thinning, duration, size};

/// Width of the first column; what follows `plan`, `model`, `done` starts here.
const LABEL: usize = 10;

/// Width of the column after it in lines about a stage or a block: `reconstruct`.
const VERB: usize = 11;

/// Shows events on stderr.
pub struct Terminal {
    width: usize,
    live: bool,
    colour: bool,
    thinning: Thinning,
    bar: Option<(String, ProgressBar)>,
}

impl Terminal {
    /// A reporter on stderr: bar and colour only if it is a terminal (`TERM=dumb` is none),
    /// colour only without `NO_COLOR`.
    pub fn new() -> Self {
        let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let live = io::stderr().is_terminal() && env::var_os("TERM").is_none_or(|t| t != "dumb");
        let columns = env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
        let width = columns.filter(|&n| n >= 40).unwrap_or(if live { 80 } else { 120 });
        let colour = live && !set("NO_COLOR");
        Self { width, live, colour, thinning: Thinning::default(), bar: None }
    }

    fn print(&self, text: &str) {
        let text = if self.colour { paint(text) } else { text.to_owned() };
        // A closed stderr must not end the run.
        let write = || drop(writeln!(io::stderr().lock(), "{text}"));
        match &self.bar {
            Some((_, bar)) => bar.suspend(write),
            None => write(),
        }
    }

    fn advance(&mut self, verb: &str, done: u64, of: u64, message: &[String]) {
        if self.bar.as_ref().is_some_and(|(old, _)| old != verb) {
            self.clear();
        }
        let (_, bar) = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(of), ProgressDrawTarget::stderr());
            // The template is a constant; were it wrong, indicatif's own would do.
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix:<11}  {bar:12}  {pos}/{len}  {eta:>3} left  {msg}",
            ) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_prefix(clean(verb));
            (verb.to_owned(), bar)
        });
        if done < bar.position() {
            bar.reset();
        }
        bar.set_length(of);
        // What stands before it: the template's columns, the position twice, and a time.
        let taken = 11 + 2 + 12 + 2 + 2 * of.to_string().len() + 1 + 2 + 4 + 5 + 2;
        bar.set_message(whole_fields(message, self.width.saturating_sub(taken)));
        bar.set_position(done);
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Reporter for Terminal {
    fn emit(&mut self, event: &Event) {
        match event {
            Event::Progress { verb, done, of, detail } if self.live => {
                self.advance(verb, *done, *of, &[clean(detail)]);
            }
            Event::Step { verb, step, of, values, .. } if self.live => {
                let values: Vec<String> = values.iter().map(|(tag, v)| value(tag, *v)).collect();
                self.advance(verb, *step, *of, &values);
            }
            _ => {
                if matches!(
                    event,
                    Event::StageStart { .. } | Event::StageEnd { .. } | Event::Done { .. }
                ) {
                    self.clear();
                }
                if self.thinning.passes(event)
                    && let Some(text) = line(event, self.width)
                {
                    self.print(&text);
                }
            }
        }
    }
}

/// As many fields as have room, side by side: a number that is cut reads as another one.
fn whole_fields(fields: &[String], width: usize) -> String {
    let joined = |count: usize| fields[..count].join("  ").trim_end().to_owned();
    let mut texts = (0..=fields.len()).rev().map(joined);
    texts.find(|text| text.chars().count() <= width).unwrap_or_default()
}

/// The text of an event in at most `width` columns: one line, except that a plan, a note or a
/// warning goes on in further, indented lines. `None` for events that have no line.
pub fn line(event: &Event, width: usize) -> Option<String> {
    Some(match event {
        Event::Plan { text } => wrap("plan", text, width),
        Event::Note { text } => wrap("note", text, width),
        Event::Warning { text } => wrap("warning", text, width),
        Event::Resumed { stage, position } => {
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
        Event::BlockLoss { .. }
        | Event::Progress { .. }
        | Event::Histogram { .. }
        | Event::Text { .. } => return None,
    })
}

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
        Event::Evaluation { what, numbers, tokens, marks, bos, data, ratio_to_float, .. } => {
            let first = numbers.first()?;
            let (name, value) = (&first.name, significant(first.value, 4));
            let head = labelled("eval", &format!("{what:<17}  {name} {value:<6}"));
            let ratio =
                ratio_to_float.map_or(String::new(), |r| format!("{}× float", significant(r, 4)));
            let mut fields = vec![
                Field::new(&format!("{ratio:<12}")),
                Field::new(&format!("{tokens} tokens")).or(&format!("{} tok", compact(*tokens))),
            ];
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
            fields.extend(best.then(|| Field::new("best")));
            Some(fit(&Field::new(&head), &fields, width))
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

/// Perplexities and their ratio as the last line says them, and the same in short.
fn verdict(float: Option<f64>, last: Option<f64>, slice: Option<u64>) -> Option<Field> {
    /// Times the float model's perplexity beyond which nothing is left to use.
    const BROKEN: f64 = 100.0;
    let on = slice.map_or(String::new(), |tokens| format!(" on {tokens} tokens"));
    Some(match (float, last) {
        (float, Some(last)) if last.is_nan() || last > super::HOPELESS => {
            let before = float.map_or(String::new(), |v| format!("{} → ", significant(v, 4)));
            let last = super::perplexity(last);
            let text = format!("{before}{last}{on}: this model is broken");
            Field::new(&format!("perplexity {text}")).or(&format!("ppl {text}"))
        }
        (Some(float), Some(last)) => {
            let ratio = last / float;
            let text = format!(
                "{} → {}, {} × float{on}{}",
                significant(float, 4),
                significant(last, 4),
                significant(ratio, 3),
                if ratio > BROKEN { ": this model is broken" } else { "" }
            );
            Field::new(&format!("perplexity {text}")).or(&format!("ppl {text}"))
        }
        (None, Some(last)) => {
            let text = format!("{}{on}, float not measured", significant(last, 4));
            Field::new(&format!("perplexity {text}")).or(&format!("ppl {text}"))
        }
        (Some(float), None) => {
            let text = format!("float {}, result not measured", significant(float, 4));
            Field::new(&format!("perplexity {text}")).or(&format!("ppl {text}"))
        }
        (None, None) => return None,
    })
}

/// Lines about what is left behind.
fn ending(event: &Event, width: usize) -> Option<String> {
    match event {
        Event::Exported { format, path, bytes, bits_per_weight, parity, seconds } => {
            let head = labelled("export", &format!("{format:<VERB$}"));
            let fields = [
                Field::new(&format!("{:>7}", size(*bytes))),
                Field::new(&format!("{bits_per_weight:>5.2} bits/weight"))
                    .or(&format!("{bits_per_weight:>5.2} bits")),
                Field::new(parity),
                Field::new(&format!("{:>6}", brief(*seconds))),
                Field::path(path),
            ];
            Some(fit(&head, &fields, width))
        }
        Event::Done {
            run,
            perplexity_float,
            perplexity_final,
            slice_tokens,
            bytes,
            bits_per_weight,
            codes_exact,
            seconds,
        } => {
            let mut fields = Vec::new();
            let verdict = verdict(*perplexity_float, *perplexity_final, *slice_tokens);
            fields.extend(verdict.clone());
            fields.extend(bytes.map(|bytes| Field::new(&size(bytes))));
            fields.extend(bits_per_weight.map(bits));
            if bytes.is_some() {
                fields.push(Field::new(if *codes_exact {
                    "codes exact"
                } else {
                    "an export is lossy"
                }));
            }
            fields.push(Field::new(&duration(*seconds)));
            let mut head = labelled("done", run);
            head.short = format!("{:<LABEL$}{}", "done", Field::path(run).short);
            let all = fields.iter().map(|field| field.long.chars().count() + 2).sum::<usize>();
            match verdict {
                // What the run is about stands whole, if need be in a line of its own: the last.
                Some(verdict) if head.long.chars().count() + all > width => {
                    let first = fit(&head, &fields[1..], width);
                    let indent = Field::new(&" ".repeat(LABEL));
                    let text = Field { long: verdict.long, short: verdict.short };
                    let joined = |text: &str| format!("{}{text}", indent.long);
                    let last = [joined(&text.long), joined(&text.short)];
                    let fits = |line: &&String| line.chars().count() <= width;
                    let whole = last.iter().find(fits).cloned();
                    let last = whole.unwrap_or_else(|| wrap("", &text.long, width));
                    Some(format!("{first}\n{last}"))
                }
                _ => Some(fit(&head, &fields, width)),
            }
        }
        _ => None,
    }
}

/// A part of a line, and its shorter form.
#[derive(Clone)]
struct Field {
    long: String,
    short: String,
}

impl Field {
    fn new(text: &str) -> Self {
        let text = clean(text);
        Self { short: text.clone(), long: text }
    }

    fn or(mut self, short: &str) -> Self {
        self.short = clean(short);
        self
    }

    /// A path, in short its last part.
    fn path(path: &str) -> Self {
        match path.trim_end_matches('/').rsplit_once('/') {
            Some((folder, name)) if !folder.is_empty() => {
                let short = format!("…/{name}");
                let shorter = short.chars().count() < path.chars().count();
                Self::new(path).or(if shorter { &short } else { path })
            }
            _ => Self::new(path),
        }
    }
}

fn bits(bits_per_weight: f64) -> Field {
    let bits = format!("{bits_per_weight:.2} bits");
    Field::new(&format!("{bits}/weight")).or(&bits)
}

fn labelled(label: &str, text: &str) -> Field {
    Field::new(&format!("{label:<LABEL$}{text}"))
}

/// `block  1/16  reconstruct`, padded so that what follows stays in its column.
fn positioned(label: &str, at: u64, of: u64, verb: &str) -> String {
    let digits = of.to_string().len().max(2);
    let position = format!("{label} {at:>digits$}/{of}");
    format!("{position:<LABEL$} {}{verb:<VERB$}", if position.len() > LABEL { " " } else { "  " })
}

/// Puts fields side by side: in full, then closer, then in short, then without the last ones.
fn fit(head: &Field, fields: &[Field], width: usize) -> String {
    let join = |count: usize, short: bool, gap: usize| {
        let mut text = if short { head.short.clone() } else { head.long.clone() };
        for field in &fields[..count] {
            text.push_str(&" ".repeat(gap));
            text.push_str(if short { &field.short } else { &field.long });
        }
        text.truncate(text.trim_end().len());
        text
    };
    let all = fields.len();
    let in_full = [(all, false, 3), (all, false, 2)].into_iter();
    let in_short = (0..=all).rev().map(|count| (count, true, 2));
    in_full
        .chain(in_short)
        .map(|(count, short, gap)| join(count, short, gap))
        .find(|text| text.chars().count() <= width)
        .unwrap_or_else(|| {
            let kept: String = join(0, true, 2).chars().take(width.saturating_sub(1)).collect();
            kept + "…"
        })
}

/// Breaks a text between words and indents what follows the first line.
fn wrap(label: &str, text: &str, width: usize) -> String {
    let room = width.saturating_sub(LABEL).max(1);
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let word: Vec<char> = clean(word).chars().collect();
        // Only a word longer than a line comes in pieces.
        for piece in word.chunks(room) {
            let gap = usize::from(used > 0);
            if used + gap + piece.len() > room {
                lines.push(String::new());
                used = 0;
            }
            if let Some(line) = lines.last_mut() {
                if used > 0 {
                    line.push(' ');
                    used += 1;
                }
                line.extend(piece);
                used += piece.len();
            }
        }
    }
    format!("{label:<LABEL$}{}", lines.join(&format!("\n{}", " ".repeat(LABEL))))
}

/// Without control characters: a file's name must not move the cursor.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Colours the label of the two lines that should catch the eye.
fn paint(line: &str) -> String {
    // A run that is over is not always a good one.
    let done = if line.contains("this model is broken") { "31" } else { "32" };
    for (label, colour) in [("warning", "33"), ("done", done)] {
        if let Some(rest) = line.strip_prefix(label) {
            return format!("\x1b[1;{colour}m{label}\x1b[0m{rest}");
        }
    }
    line.to_owned()
}

/// One value of a training step, as wide as its kind.
fn value(tag: &str, value: f64) -> String {
    let label = match tag {
        "perf/tokens_per_second" => return format!("{value:>5.0} tok/s"),
        "perf/data_wait_fraction" => return format!("wait {:>2.0}%", value * 100.0),
        "memory/peak_gib" => return memory(value),
        "train/learning_rate" => "lr",
        "train/grad_norm" => "grad",
        "distill/top1_agreement" => "top1",
        _ => tag.rsplit('/').next().unwrap_or(tag),
    };
    clean(&format!("{label} {:<7}", significant(value, 4)))
}

/// `mem 0.10 GB`, `mem 3.20 GB`, `mem 45.1 GB`: one unit in one width, to compare line by line.
fn memory(gib: f64) -> String {
    let gb = gib * 1.073_741_824;
    let decimals = if gb < 9.995 { 2 } else { usize::from(gb < 99.95) };
    format!("mem {gb:>4.decimals$} GB")
}

/// An error: `4.11e-4`.
fn tiny(value: f64) -> String {
    format!("{value:.2e}")
}

/// A number with so many significant digits; powers of ten if it is small or large.
pub(super) fn significant(value: f64, digits: usize) -> String {
    let magnitude = value.abs();
    if magnitude == 0.0 || !value.is_finite() {
        format!("{value}")
    } else if !(0.01..1e5).contains(&magnitude) {
        tiny(value)
    } else {
        let decimals = digits as f64 - 1.0 - magnitude.log10().floor();
        format!("{value:.*}", decimals.max(0.0) as usize)
    }
}

/// Seconds in at most six columns: `4.2 s`, `612 s`, `17 min`, `2.1 h`.
fn brief(seconds: f64) -> String {
    if seconds < 9.95 {
        format!("{seconds:.1} s")
    } else if seconds < 999.5 {
        format!("{seconds:.0} s")
    } else if seconds < 5970.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{:.1} h", seconds / 3600.0)
    }
}

/// `128k`
fn compact(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..10_000_000 => format!("{}k", count / 1000),
        _ => format!("{}M", count / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Number;

    fn block(index: usize, of: usize, seconds: f64) -> Event {
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

    fn needs() -> Event {
        Event::Needs {
            device: "cuda:0".into(),
            device_bytes: Some(5_100_000_000),
            host_bytes: 3_900_000_000,
            disk_bytes: 7_400_000_000,
            seconds: 7800.0,
        }
    }

    fn step(step: u64) -> Event {
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

    fn numbers(perplexity: f64) -> Vec<Number> {
        let number =
            |name: &str, tag: &str, value| Number { name: name.into(), tag: tag.into(), value };
        vec![
            number("perplexity", "eval/perplexity", perplexity),
            number("nll_per_token", "eval/loss", 2.787),
        ]
    }

    fn marks(marks: &[[&str; 2]]) -> Vec<[String; 2]> {
        marks.iter().map(|mark| mark.map(str::to_owned)).collect()
    }

    fn evaluation() -> Event {
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

    fn done() -> Event {
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

    fn at(event: &Event, width: usize) -> String {
        let text = line(event, width).unwrap();
        assert!(text.lines().all(|l| l.chars().count() <= width), "over {width}: {text}");
        text
    }

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
        let resumed = Event::Resumed { stage: "distill".into(), position: "step 12/20".into() };
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
        let validation = |perplexity, kl_forward| Event::Validation {
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
            best: true,
        };
        assert_eq!(
            at(&validation(16.234, Some(0.5)), 80),
            "val   100/2000  distill      perplexity 16.23    kl 0.5000   top1 0.5123   best"
        );
        assert_eq!(
            at(&validation(3.7e32, None), 80),
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
    fn the_last_line_cannot_be_misread() {
        let said = |float: Option<f64>, last: Option<f64>, slice| {
            verdict(float, last, slice).map(|field| field.long)
        };
        let cases = [
            (Some(17.07), Some(51.2), None, "perplexity 17.07 → 51.20, 3.00 × float"),
            (
                Some(17.07),
                Some(3.7e32),
                None,
                "perplexity 17.07 → over a million: this model is broken",
            ),
            (
                Some(17.07),
                Some(f64::NAN),
                None,
                "perplexity 17.07 → not a number: this model is broken",
            ),
            (
                Some(17.07),
                Some(2274.0),
                None,
                "perplexity 17.07 → 2274, 133 × float: this model is broken",
            ),
            (
                Some(17.07),
                Some(20.25),
                Some(1020),
                "perplexity 17.07 → 20.25, 1.19 × float on 1020 tokens",
            ),
            (None, Some(51.2), None, "perplexity 51.20, float not measured"),
            (Some(17.07), None, None, "perplexity float 17.07, result not measured"),
        ];
        for (float, last, slice, text) in cases {
            assert_eq!(said(float, last, slice).as_deref(), Some(text));
        }
        assert_eq!(said(None, None, None), None);
        let mut broken = done();
        if let Event::Done { perplexity_final, .. } = &mut broken {
            *perplexity_final = Some(3.7e32);
        }
        assert_eq!(
            at(&broken, 80).lines().last(),
            Some("          perplexity 13.90 → over a million: this model is broken")
        );
        assert!(paint(&at(&broken, 80)).starts_with("\x1b[1;31mdone"));
    }

    #[test]
    fn the_bar_cuts_no_number() {
        let values = ["loss 2.314", "lr 2.00e-5", "grad 0.5000"].map(str::to_owned);
        assert_eq!(whole_fields(&values, 80), "loss 2.314  lr 2.00e-5  grad 0.5000");
        assert_eq!(whole_fields(&values, 34), "loss 2.314  lr 2.00e-5");
        assert_eq!(whole_fields(&values, 9), "");
    }

    #[test]
    fn last_lines() {
        assert_eq!(
            at(&done(), 120),
            "done      runs/upq_int2   perplexity 13.90 → 16.21, 1.17 × float   0.61 GB   \
             2.63 bits/weight   codes exact   18 min"
        );
        assert_eq!(
            at(&done(), 80),
            "done      runs/upq_int2   0.61 GB   2.63 bits/weight   codes exact   18 min\n          \
             perplexity 13.90 → 16.21, 1.17 × float"
        );
        let exported = Event::Exported {
            format: "gguf".into(),
            path: "runs/upq_int2/export/gguf".into(),
            bytes: 612_000_000,
            bits_per_weight: 2.63,
            parity: "codes exact".into(),
            seconds: 12.0,
        };
        assert_eq!(
            at(&exported, 80),
            "export    gguf         0.61 GB   2.63 bits  codes exact    12 s  …/gguf"
        );
        let bare = Event::Done {
            run: "runs/x".into(),
            perplexity_float: None,
            perplexity_final: None,
            slice_tokens: None,
            bytes: None,
            bits_per_weight: None,
            codes_exact: false,
            seconds: 3.0,
        };
        assert_eq!(at(&bare, 80), "done      runs/x   3.0 s");
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

    #[test]
    fn thins_steps() {
        let mut thinning = Thinning::default();
        let passed = (1..=2000).filter(|&n| thinning.passes(&step(n))).count();
        assert_eq!(passed, 21);
        assert!(!thinning.passes(&step(2000)));
        thinning.passes(&Event::StageStart { stage: 1, of: 4, name: "distill".into() });
        assert!(thinning.passes(&step(1)));
    }

    #[test]
    fn numbers_for_people() {
        let numbers = [0.0, 2.314_15, 13.9, 0.5, 0.000_02, 123_456.0, 1234.5, -2.5];
        assert_eq!(
            numbers.map(|n| significant(n, 4)),
            ["0", "2.314", "13.90", "0.5000", "2.00e-5", "1.23e5", "1234", "-2.500"]
        );
    }

    #[test]
    fn colours_only_the_label() {
        assert_eq!(paint("warning   x"), "\x1b[1;33mwarning\x1b[0m   x");
        assert_eq!(paint("note      x"), "note      x");
    }
}

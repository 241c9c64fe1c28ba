//! The lines about what is left behind.

use super::layout::{Field, LABEL, VERB, fit, labelled, wrap};
use crate::report::numbers::{HOPELESS, brief, significant};
use crate::report::{Event, duration, perplexity, size};

/// Lines about what is left behind.
pub(super) fn ending(event: &Event, width: usize) -> Option<String> {
    match event {
        Event::Exported {
            format,
            path,
            bytes,
            bits_per_weight,
            bits_per_parameter,
            parity,
            seconds,
        } => {
            let head = labelled("export", &format!("{format:<VERB$}"));
            let fields = [
                Field::new(&format!("{:>7}", size(*bytes))),
                Field::new(&format!("{bits_per_weight:>5.2} bits/weight"))
                    .or(&format!("{bits_per_weight:>5.2} bits")),
                Field::new(parity),
                Field::new(&format!("{:>6}", brief(*seconds))),
                Field::path(path),
                Field::new(&format!("{bits_per_parameter:.2} bits a parameter in all"))
                    .or(&format!("{bits_per_parameter:.2} in all")),
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
                    let indented = |text: &str| format!("{:LABEL$}{text}", "");
                    let last = [indented(&verdict.long), indented(&verdict.short)];
                    let fits = |line: &&String| line.chars().count() <= width;
                    let whole = last.iter().find(fits).cloned();
                    let last = whole.unwrap_or_else(|| wrap("", &verdict.long, width));
                    Some(format!("{first}\n{last}"))
                }
                _ => Some(fit(&head, &fields, width)),
            }
        }
        _ => None,
    }
}

/// Perplexities and their ratio as the last line says them, and the same in short.
fn verdict(float: Option<f64>, last: Option<f64>, slice: Option<u64>) -> Option<Field> {
    /// Times the float model's perplexity beyond which nothing is left to use.
    const BROKEN: f64 = 100.0;
    let on = slice.map_or(String::new(), |tokens| format!(" on {tokens} tokens"));
    let text = match (float, last) {
        (float, Some(last)) if last.is_nan() || last > HOPELESS => {
            let before = float.map_or(String::new(), |v| format!("{} → ", significant(v, 4)));
            format!("{before}{}{on}: this model is broken", perplexity(last))
        }
        (Some(float), Some(last)) => {
            let ratio = last / float;
            format!(
                "{} → {}, {} × float{on}{}",
                significant(float, 4),
                significant(last, 4),
                significant(ratio, 3),
                if ratio > BROKEN { ": this model is broken" } else { "" }
            )
        }
        (None, Some(last)) => format!("{}{on}, float not measured", significant(last, 4)),
        (Some(float), None) => format!("float {}, result not measured", significant(float, 4)),
        (None, None) => return None,
    };
    Some(Field::new(&format!("perplexity {text}")).or(&format!("ppl {text}")))
}

fn bits(bits_per_weight: f64) -> Field {
    let bits = format!("{bits_per_weight:.2} bits");
    Field::new(&format!("{bits}/weight")).or(&bits)
}

#[cfg(test)]
mod tests {
    use super::super::paint;
    use super::super::sample::{at, done};
    use super::*;

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
            bits_per_parameter: 3.1,
            parity: "codes exact".into(),
            seconds: 12.0,
        };
        assert_eq!(
            at(&exported, 80),
            "export    gguf         0.61 GB   2.63 bits  codes exact    12 s  …/gguf"
        );
        assert_eq!(
            at(&exported, 90),
            "export    gguf         0.61 GB   2.63 bits  codes exact    12 s  …/gguf  3.10 in all"
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
}

//! Scoring of IFEval ("Instruction-Following Evaluation for Large Language Models", Zhou et al. 2023,
//! arXiv:2311.07911): 25 kinds of instructions whose following a program can check.
//!
//! Every decision is that of the reference implementation as lm-evaluation-harness ships it (version 4.0
//! of its task, NLTK 3.10), except for languages, which it guesses at random.

mod check;
mod instruction;
mod json;
mod language;
mod pattern;
mod punkt;
mod python;
mod words;

pub use instruction::{Count, Instruction, Word};

/// Which instructions an answer follows, in their order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Followed {
    /// The answer as it stands.
    pub strict: Vec<bool>,
    /// Any of the answer's forms: without its first line, its last line, its stars.
    pub loose: Vec<bool>,
}

/// Checks an answer for instructions.
pub fn check(instructions: &[Instruction], answer: &str) -> Followed {
    let forms = forms(answer);
    let strict: Vec<bool> =
        instructions.iter().map(|instruction| check::follows(instruction, answer)).collect();
    let loose = instructions.iter().zip(&strict).map(|(instruction, strict)| {
        *strict || forms.iter().any(|form| check::follows(instruction, form))
    });
    Followed { loose: loose.collect(), strict }
}

/// The forms of an answer besides itself.
fn forms(answer: &str) -> Vec<String> {
    let lines: Vec<&str> = answer.split('\n').collect();
    let last = lines.len() - 1;
    let joined = |lines: &[&str]| python::strip(&lines.join("\n")).to_owned();
    let both = lines.get(1..last).unwrap_or_default();
    let cut = [joined(&lines[1..]), joined(&lines[..last]), joined(both)];
    let mut forms = vec![answer.replace('*', "")];
    forms.extend(cut.iter().map(|form| form.replace('*', "")));
    forms.extend(cut);
    forms.sort_unstable();
    forms.dedup();
    forms.retain(|form| form != answer);
    forms
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn instruction(name: &str, keys: serde_json::Value) -> Instruction {
        Instruction::parse(name, keys.as_object().unwrap()).unwrap()
    }

    #[test]
    fn a_first_line_and_stars_are_forgiven_when_loose() {
        let quoted = instruction("startend:quotation", json!({}));
        let titled = instruction("detectable_format:title", json!({}));
        let found = check(&[quoted.clone(), titled], "Sure:\n\"**yes**\"\n");
        assert_eq!(found.strict, [false, false]);
        assert_eq!(found.loose, [true, false]);
        assert_eq!(check(&[quoted], " \n").loose, [false]);
    }
}

//! Which instructions an answer follows.

use super::check::follows;
use super::instruction::Instruction;
use super::python::strip;

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
        instructions.iter().map(|instruction| follows(instruction, answer)).collect();
    let loose = instructions.iter().zip(&strict).map(|(instruction, strict)| {
        *strict || forms.iter().any(|form| follows(instruction, form))
    });
    Followed { loose: loose.collect(), strict }
}

/// The forms of an answer besides itself.
fn forms(answer: &str) -> Vec<String> {
    let lines: Vec<&str> = answer.split('\n').collect();
    let last = lines.len() - 1;
    let joined = |lines: &[&str]| strip(&lines.join("\n")).to_owned();
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

    fn instruction(name: &str, keys: &serde_json::Value) -> Instruction {
        Instruction::parse(name, keys.as_object().unwrap()).unwrap()
    }

    #[test]
    fn a_first_line_and_stars_are_forgiven_when_loose() {
        let quoted = instruction("startend:quotation", &json!({}));
        let titled = instruction("detectable_format:title", &json!({}));
        let found = check(&[quoted.clone(), titled], "Sure:\n\"**yes**\"\n");
        assert_eq!(found.strict, [false, false]);
        assert_eq!(found.loose, [true, false]);
        assert_eq!(check(&[quoted], " \n").loose, [false]);
    }
}

//! The rows, and the examples that stand before each.

use std::path::PathBuf;

use super::super::conversation::Conversation;
use super::super::python_random::PythonRandom;
use crate::data::{Columns, Row, read_rows};
use crate::error::{Error, Result};

const COLUMNS: Columns = Columns { names: &["question", "answer"], telling: "question" };

/// A word problem and its answer, which ends with `#### ` and a number.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Problem {
    pub(super) question: String,
    pub(super) answer: String,
}

impl Problem {
    fn of(row: &Row) -> Result<Self, String> {
        let text = |key: &str| match row.fields.get(key).map(|value| value.as_str()) {
            Some(Some(text)) => Ok(text.to_owned()),
            Some(None) => Err(format!("its {key} is not a text")),
            None => Err(format!("the row has no {key}")),
        };
        let problem = Self { question: text("question")?, answer: text("answer")? };
        if problem.answer.contains("#### ") {
            Ok(problem)
        } else {
            Err("its answer does not end with `#### ` and a number".to_owned())
        }
    }

    fn prompt(&self) -> String {
        format!("Question: {}\nAnswer:", self.question)
    }
}

/// The problems of files.
///
/// # Errors
/// When a file holds no rows, or a row is no problem.
pub(super) fn problems(files: &[PathBuf]) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for path in files {
        for row in read_rows(path, COLUMNS)? {
            let problem = Problem::of(&row).map_err(|what| {
                Error::preflight(what)
                    .at(path.display())
                    .at(&row.place)
                    .fix("rows of GSM8K: {\"question\": …, \"answer\": \"… #### 42\"}")
            });
            problems.push(problem?);
        }
    }
    Ok(problems)
}

/// How examples are chosen.
#[derive(Clone, Copy)]
pub(super) struct Shots {
    pub(super) count: usize,
    pub(super) seed: u32,
}

/// Each of the first `limit` problems behind examples that are drawn for it from `examples`, or from the
/// other problems.
///
/// # Errors
/// When there are too few.
pub(super) fn conversations(
    problems: &[Problem],
    examples: Option<&[Problem]>,
    shots: Shots,
    limit: usize,
) -> Result<Vec<Conversation>> {
    let mut random = PythonRandom::new(shots.seed);
    let pool = examples.unwrap_or(problems);
    let own = examples.is_none();
    let mut conversation = |problem: &Problem| {
        let mut drawn = Vec::new();
        if shots.count > 0 {
            // One more, should the problem itself be among them.
            drawn = random.sample(pool.len(), shots.count + usize::from(own));
            drawn.retain(|place| !own || pool[*place] != *problem);
            drawn.truncate(shots.count);
        }
        if drawn.len() < shots.count && own {
            // Copies of it were.
            let others: Vec<usize> =
                (0..pool.len()).filter(|place| pool[*place] != *problem).collect();
            drawn = random.sample(others.len(), shots.count);
            drawn = drawn.into_iter().map(|place| others[place]).collect();
        }
        if drawn.len() < shots.count {
            let (count, found) = (shots.count, drawn.len());
            return Err(Error::preflight(format!(
                "{count} examples stand before a question, and there are {found}"
            ))
            .at("shots")
            .fix(format!("shots = {found}, or examples = a file with more rows")));
        }
        let example = |place: &usize| (pool[*place].prompt(), pool[*place].answer.clone());
        Ok(Conversation {
            system: None,
            examples: drawn.iter().map(example).collect(),
            question: problem.prompt(),
        })
    };
    problems.iter().take(limit).map(&mut conversation).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(count: usize) -> Vec<Problem> {
        let problem = |n: usize| Problem { question: format!("{n}?"), answer: format!("#### {n}") };
        (0..count).map(problem).collect()
    }

    #[test]
    fn examples_are_drawn_anew_and_never_the_question() {
        let problems = numbered(30);
        let shots = Shots { count: 3, seed: 1234 };
        let own = conversations(&problems, None, shots, 20).unwrap();
        assert_eq!(own.len(), 20);
        assert!(own.iter().all(|c| c.examples.len() == 3));
        assert!(own.iter().all(|c| c.examples.iter().all(|(q, _)| *q != c.question)));
        assert_ne!(own[0].examples, own[1].examples);
        let others = conversations(&problems[..2], Some(&problems[2..]), shots, 9).unwrap();
        assert_eq!(others.len(), 2);
        let copies = vec![problems[0].clone(); 5];
        let error = conversations(&copies, None, shots, 1).unwrap_err();
        assert_eq!(error.what(), "3 examples stand before a question, and there are 0");
        let none = conversations(&copies, None, Shots { count: 0, seed: 0 }, 1).unwrap();
        assert_eq!(none[0].text(None, true).unwrap(), "Question: 0?\nAnswer:");
    }
}

//! From log-likelihoods to accuracies and their standard errors.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::benchmark::Question;
use super::group;

/// What a model answers to a question.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answered {
    /// Of each answer, nats.
    pub(super) log_likelihoods: Vec<f64>,
    /// The likeliest answer, the first one of a tie.
    pub(super) likeliest: usize,
    /// The likeliest one when log-likelihoods are divided by the answers' letters.
    pub(super) likeliest_by_length: usize,
}

impl Answered {
    pub(super) fn new(question: &Question, log_likelihoods: Vec<f64>) -> Self {
        let letters = question.answers.iter().map(|answer| answer.chars().count() as f64);
        let by_length: Vec<f64> =
            log_likelihoods.iter().zip(letters).map(|(sum, letters)| sum / letters).collect();
        let (likeliest, likeliest_by_length) = (first_of(&log_likelihoods), first_of(&by_length));
        Self { log_likelihoods, likeliest, likeliest_by_length }
    }
}

/// The place of the largest value, the first one of equal ones.
fn first_of(values: &[f64]) -> usize {
    let mut best = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = place;
        }
    }
    best
}

/// A share of questions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Share {
    hits: f64,
    of: f64,
}

impl Share {
    fn of(hits: impl IntoIterator<Item = bool>) -> Self {
        let mut share = Self::default();
        for hit in hits {
            share.hits += f64::from(u8::from(hit));
            share.of += 1.0;
        }
        share
    }

    fn mean(self) -> f64 {
        self.hits / self.of
    }

    /// The standard error of the mean, from the sample's variance; none of a single question.
    fn error(self) -> Option<f64> {
        let variance = self.mean() * (1.0 - self.mean()) * self.of / (self.of - 1.0);
        (self.of > 1.0).then(|| (variance / self.of).sqrt())
    }
}

/// The mean over all questions of several subjects, with the error that the variance within subjects gives.
fn pooled(shares: &[Share]) -> (f64, Option<f64>) {
    let (hits, of) = shares.iter().fold((0.0, 0.0), |(h, o), s| (h + s.hits, o + s.of));
    let squares: Option<f64> =
        shares.iter().map(|share| Some((share.of - 1.0) * share.error()?.powi(2) * share.of)).sum();
    let freedom = of - shares.len() as f64;
    let error = squares.filter(|_| freedom > 0.0).map(|squares| (squares / freedom / of).sqrt());
    (hits / of, error)
}

/// Numbers of questions by name: of all, and where they have subjects of their groups, with the subjects' own as
/// JSON.
pub(super) fn numbers(
    questions: &[Question],
    answered: &[Answered],
    is_normed: bool,
) -> (Vec<(String, f64)>, Option<Value>) {
    let mut numbers = Vec::new();
    let mut add = |name: &str, mean: f64, error: Option<f64>| {
        numbers.push((name.to_owned(), mean));
        numbers.extend(error.map(|error| (format!("{name}_stderr"), error)));
    };
    let right = |(question, found): (&Question, &Answered)| found.likeliest == question.right;
    let all = || questions.iter().zip(answered);
    if questions.iter().all(|question| question.subject.is_empty()) {
        let share = Share::of(all().map(right));
        add("acc", share.mean(), share.error());
        if is_normed {
            let right = |(q, found): (&Question, &Answered)| found.likeliest_by_length == q.right;
            let share = Share::of(all().map(right));
            add("acc_norm", share.mean(), share.error());
        }
        return (numbers, None);
    }
    let mut subjects: BTreeMap<&str, Share> = BTreeMap::new();
    for (question, found) in all() {
        let share = subjects.entry(&question.subject).or_default();
        share.hits += f64::from(u8::from(right((question, found))));
        share.of += 1.0;
    }
    let shares: Vec<Share> = subjects.values().copied().collect();
    let (mean, error) = pooled(&shares);
    add("acc", mean, error);
    for (name, _) in group::GROUPS {
        let own = subjects.iter().filter(|(subject, _)| group::group_of(subject) == Some(name));
        let own: Vec<Share> = own.map(|(_, share)| *share).collect();
        if !own.is_empty() {
            let (mean, error) = pooled(&own);
            add(name, mean, error);
        }
    }
    let told: Map<String, Value> = subjects
        .iter()
        .map(|(subject, share)| {
            let told = json!({ "acc": share.mean(), "acc_stderr": share.error(), "rows": share.of as u64 });
            ((*subject).to_owned(), told)
        })
        .collect();
    (numbers, Some(Value::Object(told)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(subject: &str, answers: &[&str], right: usize) -> Question {
        let answers = answers.iter().map(|answer| (*answer).to_owned()).collect();
        Question { subject: subject.to_owned(), answers, right, ..Question::default() }
    }

    #[test]
    fn ties_go_to_the_first_and_lengths_are_letters() {
        // "öö" is two letters and four bytes.
        let question = question("", &["öö", "abcd", "z"], 0);
        let found = Answered::new(&question, vec![-4.0, -8.0, -2.0]);
        assert_eq!((found.likeliest, found.likeliest_by_length), (2, 0));
        assert_eq!(Answered::new(&question, vec![-1.0, -1.0, -1.0]).likeliest, 0);
    }

    /// The figures are those of the formulas, by hand.
    #[test]
    fn errors_are_of_the_sample_and_pooled_over_subjects() {
        let share = |hits, of| Share { hits, of };
        let error = share(3.0, 4.0).error().unwrap();
        assert!((error - (0.25_f64 / 4.0).sqrt()).abs() < 1e-15);
        assert_eq!(share(1.0, 1.0).error(), None);
        let (mean, error) = pooled(&[share(3.0, 4.0), share(1.0, 2.0)]);
        assert!((mean - 4.0 / 6.0).abs() < 1e-15);
        // Squared deviations: 4 * 3/16 and 2 * 1/4, over 6 - 2 degrees of freedom, over 6.
        assert!((error.unwrap() - (1.25_f64 / 4.0 / 6.0).sqrt()).abs() < 1e-15);
        assert_eq!(pooled(&[share(1.0, 1.0)]).1, None);
    }

    #[test]
    fn groups_are_told_where_there_are_subjects() {
        let questions = [
            question("anatomy", &["A", "B"], 0),
            question("anatomy", &["A", "B"], 0),
            question("virology", &["A", "B"], 1),
            question("virology", &["A", "B"], 0),
        ];
        let answered: Vec<Answered> =
            questions.iter().map(|q| Answered::new(q, vec![-1.0, -2.0])).collect();
        let (found, subjects) = numbers(&questions, &answered, false);
        let names: Vec<&str> = found.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, ["acc", "acc_stderr", "stem", "stem_stderr", "other", "other_stderr"]);
        assert_eq!((found[0].1, found[2].1, found[4].1), (0.75, 1.0, 0.5));
        assert_eq!(subjects.unwrap()["virology"]["rows"], 2);
    }
}

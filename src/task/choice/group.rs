//! MMLU's subjects and the groups that its numbers are told by.

/// The groups, in the order of reports.
pub(super) const GROUPS: [(&str, &[&str]); 4] = [
    ("humanities", HUMANITIES),
    ("social_sciences", SOCIAL_SCIENCES),
    ("stem", STEM),
    ("other", OTHER),
];

const STEM: &[&str] = &[
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "electrical_engineering",
    "elementary_mathematics",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_mathematics",
    "high_school_physics",
    "high_school_statistics",
    "machine_learning",
];
const OTHER: &[&str] = &[
    "business_ethics",
    "clinical_knowledge",
    "college_medicine",
    "global_facts",
    "human_aging",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "nutrition",
    "professional_accounting",
    "professional_medicine",
    "virology",
];
const SOCIAL_SCIENCES: &[&str] = &[
    "econometrics",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_microeconomics",
    "high_school_psychology",
    "human_sexuality",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
];
const HUMANITIES: &[&str] = &[
    "formal_logic",
    "high_school_european_history",
    "high_school_us_history",
    "high_school_world_history",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "moral_disputes",
    "moral_scenarios",
    "philosophy",
    "prehistory",
    "professional_law",
    "world_religions",
];

/// The subject of a file called `anatomy_val.csv`.
pub(super) fn subject_of(file: &str) -> String {
    let stem = file.split('.').next().unwrap_or(file);
    let parts = ["_dev", "_val", "_test", "_validation", "_train"];
    let subject = parts.iter().find_map(|part| stem.strip_suffix(part)).unwrap_or(stem);
    subject.strip_prefix("mmlu_").unwrap_or(subject).to_owned()
}

/// The group of a subject.
pub(super) fn group_of(subject: &str) -> Option<&'static str> {
    GROUPS.iter().find(|(_, subjects)| subjects.contains(&subject)).map(|(group, _)| *group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_of_files() {
        assert_eq!(subject_of("anatomy_val.csv"), "anatomy");
        assert_eq!(subject_of("us_foreign_policy_test.jsonl"), "us_foreign_policy");
        assert_eq!(subject_of("anatomy"), "anatomy");
        assert_eq!(group_of("anatomy"), Some("stem"));
        assert_eq!(group_of("cooking"), None);
        assert_eq!(GROUPS.iter().map(|(_, subjects)| subjects.len()).sum::<usize>(), 57);
    }
}

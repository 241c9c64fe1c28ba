//! A task in a record: its keys, and its name beside them under `name`, which is `ppl` where nothing is.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::{Map, Value};

use super::config::TaskConfig;

/// Writes the keys and the name.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(task: &TaskConfig, serializer: S) -> Result<S::Ok, S::Error> {
    let value = serde_json::to_value(task).map_err(ser::Error::custom)?;
    let mut keys = value.get(task.name()).and_then(Value::as_object).cloned().unwrap_or_default();
    keys.insert("name".to_owned(), task.name().into());
    keys.serialize(serializer)
}

/// Reads them.
///
/// # Errors
/// The deserializer's, and an unknown name or key.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<TaskConfig, D::Error> {
    let mut keys = Map::deserialize(from)?;
    let name = match keys.remove("name") {
        Some(Value::String(name)) => name,
        _ => TaskConfig::default().name().to_owned(),
    };
    let task = Map::from_iter([(name, Value::Object(keys))]);
    serde_json::from_value(Value::Object(task)).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{PplConfig, recorded};

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    struct Record {
        #[serde(with = "recorded")]
        task: TaskConfig,
    }

    #[test]
    fn records_name_their_task_and_older_ones_are_read() {
        let task = TaskConfig::Ppl(PplConfig { windows: Some(8), ..PplConfig::default() });
        let record = Record { task };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(text, r#"{"task":{"windows":8,"name":"ppl"}}"#);
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert_eq!(serde_json::from_str::<Record>(r#"{"task":{"windows":8}}"#).unwrap(), record);
        let unknown = serde_json::from_str::<Record>(r#"{"task":{"name":"bleu"}}"#).unwrap_err();
        assert!(unknown.to_string().contains("bleu"), "{unknown}");
    }
}

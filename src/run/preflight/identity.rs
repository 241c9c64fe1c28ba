//! What checkpoints depend on: the recipe, and the model and data by their hashes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::model::companions;
use crate::recipe::{Plan, to_toml};
use crate::report::terminal::Terminal;
use crate::report::{Event, Reporter, size};
use crate::run::Fingerprint;
use crate::stage::Data;
use crate::stop::StopFlag;
use crate::store::{hashes, hex};

/// Less than this is read in a moment.
const WORTH_A_LINE: u64 = 1 << 30;

/// The fingerprint of all but the model's files.
pub(super) fn without_model(plan: &Plan, data: &Data) -> Result<Fingerprint> {
    let corpora = [
        ("calibration", &data.calibration),
        ("train", &data.train),
        ("validation", &data.validation),
    ];
    let mut hashes: BTreeMap<String, String> = corpora
        .into_iter()
        .filter_map(|(role, corpus)| Some((role, corpus.as_ref()?)))
        .flat_map(|(role, corpus)| {
            let template = corpus.template.clone();
            let template = template.map(|hash| (format!("{role}.chat_template"), hash));
            std::iter::once((role.to_owned(), corpus.sha256.clone())).chain(template)
        })
        .collect();
    for (index, stage) in plan.stages.iter().enumerate() {
        let own = stage.config.stage().own_data()?.into_iter();
        hashes.extend(own.map(|(what, sha256)| (format!("stage.{index}.{what}"), sha256)));
    }
    Ok(Fingerprint {
        recipe: to_toml(&plan.recipe.clone().neutral())?,
        model: String::new(),
        data: hashes,
    })
}

/// The hash of the files of the model in `dir`, of its weights in `weights`, read as far as they changed
/// since they were last hashed.
///
/// # Errors
/// When a file cannot be read, or a signal came.
pub fn model_sha256(dir: &Path, weights: &[PathBuf], stop: &StopFlag) -> Result<String> {
    let mut files: Vec<PathBuf> = vec![dir.join("config.json")];
    files.retain(|file| file.is_file()); // a GGUF file has it inside
    files.extend(weights.iter().cloned());
    files.extend(companions(dir)); // another tokenizer makes other tokens
    let known: Vec<Option<String>> = files.iter().map(|file| hashes::remembered(file)).collect();
    let unknown = files.iter().zip(&known).filter(|(_, known)| known.is_none());
    let of: u64 = unknown.map(|(file, _)| file.metadata().map_or(0, |data| data.len())).sum();
    let mut screen = (of >= WORTH_A_LINE).then(Terminal::new);
    if let Some(screen) = &mut screen {
        let text = format!("reading {} of weights for their hash, once", size(of));
        screen.emit(&Event::Note { text });
    }
    let (mut hash, mut before) = (Sha256::new(), 0);
    for (file, known) in files.iter().zip(known) {
        if let Some(known) = known {
            hash.update(known);
            continue;
        }
        let mut done = before;
        let found = hashes::sha256(file, &mut |bytes| {
            done = before + bytes;
            if let Some(screen) = &mut screen {
                let (verb, detail) = ("hash".to_owned(), "MB of the model".to_owned());
                screen.emit(&Event::Progress { verb, done: done >> 20, of: of >> 20, detail });
            }
            stop.check()
        });
        hash.update(found?);
        before = done;
    }
    Ok(hex(&hash.finalize()))
}

//! What reads files: a function of bytes for each kind of file. It returns when the bytes are a
//! sound file, or were refused as an error has to be; all else is a fault and panics.
//!
//! `fuzz/` hands the same functions to cargo-fuzz.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use fewbit::data::chat::{Chat, ChatTemplate, Clock, TrainOn, parts};
use fewbit::data::{
    DataFormat, Tokenizer, read_completions, read_conversations, read_documents, read_instructions,
};
use fewbit::error::{Error, Kind, Result};
use fewbit::export::fewbit::Saved;
use fewbit::export::{Adapter, Manifest, OpenModel, open_float, open_model};
use fewbit::model::{ModelConfig, ModelShape, WeightSource};
use fewbit::recipe::{self, Base, Plan, Recipe};
use fewbit::run::RunRecord;
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;

/// Exported folders by format, which [`folder`] damages; `FEWBIT_FUZZ_FOLDERS` where it is not set.
pub(crate) static FOLDERS: OnceLock<PathBuf> = OnceLock::new();

/// A target.
pub(crate) type Run = fn(&[u8]);

/// Every target by name.
pub(crate) const ALL: [(&str, Run); 16] = [
    ("safetensors", safetensors),
    ("index", index),
    ("gguf", gguf),
    ("gguf_model", gguf_model),
    ("recipe", recipe),
    ("config", config),
    ("tokenizer", tokenizer),
    ("tokenizer_config", tokenizer_config),
    ("documents", documents),
    ("examples", examples),
    ("chat_template", chat_template),
    ("adapter", adapter),
    ("manifest", manifest),
    ("checkpoint", checkpoint),
    ("run_record", run_record),
    ("folder", folder),
];

/// What encoders and decoders of damaged tokenizers are given.
const TEXTS: [&str; 4] = ["Once upon a time, in 1984", "", " naïve ▁<s>ⅷ</s>\u{0}\r\n", "a"];

/// A folder of this thread's own in memory.
fn scratch() -> PathBuf {
    thread_local! {
        static FOLDER: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
    }
    FOLDER.with_borrow_mut(|folder| {
        let made = folder.get_or_insert_with(|| {
            let memory = Path::new("/dev/shm");
            let made =
                if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            made.unwrap()
        });
        made.path().to_owned()
    })
}

fn written(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// The value, or nothing where damage was refused as damage: exit code 3, and what to do.
fn sound<T>(result: Result<T>) -> Option<T> {
    refused_with(result, &[Kind::Preflight])
}

fn refused_with<T>(result: Result<T>, kinds: &[Kind]) -> Option<T> {
    result.map_err(|error| checked(&error, kinds)).ok()
}

fn checked(error: &Error, kinds: &[Kind]) {
    let told = error.to_string();
    assert!(kinds.contains(&error.kind()), "exit code {}: {told}", error.kind().exit_code());
    assert!(told.contains("\n  try  "), "no advice: {told}");
    assert!(told.contains("\n  at   "), "no place: {told}");
    assert!(told.lines().count() <= 3 || kinds.contains(&Kind::Usage), "more lines: {told}");
}

/// A text of a recipe, against a model.
pub(crate) fn recipe(bytes: &[u8]) {
    static MODEL: OnceLock<ModelConfig> = OnceLock::new();
    let model = MODEL
        .get_or_init(|| ModelConfig::parse(include_str!("../parity/llama/config.json")).unwrap());
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let kinds = [Kind::Usage, Kind::Preflight];
    let parsed = recipe::parse::<Recipe>(text, "recipe.toml", &[]);
    if let Some((recipe, _)) = refused_with(parsed, &kinds) {
        refused_with(Plan::new(recipe, model, &Base::default(), text, &[]), &kinds);
    }
}

/// A `config.json`.
pub(crate) fn config(bytes: &[u8]) {
    let path = written("config.json", bytes);
    let Some(config) = sound(ModelConfig::read(&scratch())) else { return };
    assert!(config.tensors().len() >= config.n_blocks);
    for span in config.arch.spans.iter().filter_map(|span| span.rope.as_ref()) {
        assert!(span.inverse_frequencies(config.max_positions).len() <= config.head_dim);
    }
    if let Some(shape) = sound(ModelShape::read(&path)) {
        refused_with(shape.bytes(4, Some(32)), &[Kind::Usage, Kind::Preflight]);
        let _ = (shape.parameters(), shape.rest());
    }
}

/// A safetensors file.
pub(crate) fn safetensors(bytes: &[u8]) {
    let path = written("model.safetensors", bytes);
    let Some(file) = sound(Checkpoint::open_file(&path)) else { return };
    assert!(file.total_bytes() <= bytes.len() as u64);
    for name in file.names() {
        let Some(tensor) = sound(file.read(name)) else { continue };
        if tensor.dtype.is_read() {
            sound(file.read_f32(name, &tensor.shape));
        }
    }
}

/// A `model.safetensors.index.json` beside two shards.
pub(crate) fn index(bytes: &[u8]) {
    let folder = scratch().join("sharded");
    if !folder.is_dir() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(&folder).unwrap();
        for (number, file) in super::seeds::shards(dir.path()).into_iter().enumerate() {
            std::fs::write(folder.join(format!("model-{}.safetensors", number + 1)), file).unwrap();
        }
    }
    std::fs::write(folder.join("model.safetensors.index.json"), bytes).unwrap();
    let Some(checkpoint) = sound(Checkpoint::open(&folder)) else { return };
    for name in checkpoint.names() {
        let file = &checkpoint.info(name).unwrap().file;
        assert_eq!(file.parent(), Some(&*folder), "{name} leads out of the folder");
        sound(checkpoint.read(name));
    }
}

/// A GGUF file as the container's crate reads it.
pub(crate) fn gguf(bytes: &[u8]) {
    let read = fewbit_gguf::Reader::new(Cursor::new(bytes), Path::new("m.gguf"));
    let Some(mut file) = sound(read.map_err(Error::from)) else { return };
    let tensors: Vec<_> = file.tensors().iter().map(|(n, t)| (n.clone(), t.clone())).collect();
    for (name, info) in tensors {
        let Some(stored) = sound(file.read(&name).map_err(Error::from)) else { continue };
        assert_eq!(stored.len() as u64, info.bytes);
        sound(file.read_f32(&name).map_err(Error::from));
        let levels = fewbit_gguf::decode_levels(info.kind, &stored);
        sound(levels.map_err(|e| Error::from(e).at(&name)));
    }
}

/// A GGUF file as a model of its own.
pub(crate) fn gguf_model(bytes: &[u8]) {
    let path = written("alone.gguf", bytes);
    if let Some(opened) = sound(open_model(&path)) {
        read_all(&opened);
    }
}

/// A `tokenizer.json`.
pub(crate) fn tokenizer(bytes: &[u8]) {
    let folder = scratch();
    std::fs::write(folder.join("tokenizer_config.json"), "{\"bos_token\": \"<s>\"}").unwrap();
    written("tokenizer.json", bytes);
    if let Some(tokenizer) = sound(Tokenizer::load(&folder)) {
        use_tokenizer(&tokenizer);
    }
}

/// A `tokenizer_config.json`.
pub(crate) fn tokenizer_config(bytes: &[u8]) {
    let folder = scratch().join("configured");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("tokenizer.json"), super::seeds::WORDS).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), bytes).unwrap();
    if let Some(tokenizer) = sound(Tokenizer::load(&folder)) {
        sound(tokenizer.bos_id());
        sound(tokenizer.eos_id());
    }
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in TEXTS {
        if let Some(ids) = sound(tokenizer.encode(text)) {
            sound(tokenizer.decode(&ids, false));
        }
    }
    sound(tokenizer.decode(&[0, 1, 2, 5, 300, u32::MAX], true));
    sound(tokenizer.encode_continuations(&["a".to_owned()]));
    let _ = tokenizer.vocab_size();
    sound(tokenizer.bos_id());
}

/// A data file under each name that decides how it is read.
pub(crate) fn documents(bytes: &[u8]) {
    for name in ["data.jsonl", "data.txt"] {
        let path = written(name, bytes);
        sound(read_documents(&path));
        sound(DataFormat::Auto.of(&path));
    }
}

/// A data file of prompts with completions.
pub(crate) fn examples(bytes: &[u8]) {
    let path = written("examples.jsonl", bytes);
    sound(read_completions(&path));
    sound(read_instructions(&path));
    for chat in sound(read_conversations(&path)).into_iter().flatten() {
        assert!(chat.answers().count() <= chat.messages.len());
    }
}

/// A chat template, with a conversation that it writes.
pub(crate) fn chat_template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let Some(template) = sound(ChatTemplate::new(source, BTreeMap::new(), "t.jinja")) else {
        return;
    };
    let template = template.with_clock(Clock::Unset);
    let text = r#"[{"role": "system", "content": "S"}, {"role": "user", "content": "A"},
        {"role": "assistant", "content": "<think>x</think>1", "tool_calls": [{"name": "f", "arguments": {"a": [1]}}]},
        {"role": "tool", "content": "B"}, {"role": "assistant", "content": "2"}]"#;
    let mut chat = Chat::of_messages(&serde_json::from_str(text).unwrap()).unwrap();
    chat.set_tools(&serde_json::json!([{"name": "f"}])).unwrap();
    for train_on in [TrainOn::Assistant, TrainOn::Each] {
        let added = ["<|im_end|>".to_owned()];
        for example in sound(parts(&template, &chat, train_on, &added)).into_iter().flatten() {
            assert!(example.iter().any(|part| part.learned));
        }
    }
}

/// A scale adapter.
pub(crate) fn adapter(bytes: &[u8]) {
    let path = written("adapter.safetensors", bytes);
    let Some(adapter) = sound(Adapter::read(&path)) else { return };
    assert!(adapter.numbers() <= bytes.len());
    for (name, record) in adapter.records() {
        let _ = (adapter.scales(name), adapter.offsets(name), record.layout());
    }
}

/// A `manifest.json`.
pub(crate) fn manifest(bytes: &[u8]) {
    written("manifest.json", bytes);
    sound(Manifest::read(&scratch()));
}

/// A block's file of an unfinished run; it is the run's own, so exit code 1 and another advice.
pub(crate) fn checkpoint(bytes: &[u8]) {
    let path = written("block.safetensors", bytes);
    let kinds = [Kind::Failed, Kind::Preflight];
    if let Some(saved) = refused_with(Saved::read(&path), &kinds) {
        assert!(saved.linears.len() <= bytes.len());
    }
}

/// A `run.json`.
pub(crate) fn run_record(bytes: &[u8]) {
    let folder = scratch().join("run");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("run.json"), bytes).unwrap();
    if let Ok(Some(record)) = RunRecord::read(&folder) {
        let _ = record.fingerprint.difference(&record.fingerprint);
    }
}

/// The files of [`FOLDERS`], as format and name.
pub(crate) fn folder_files() -> &'static [(String, String)] {
    static FILES: OnceLock<Vec<(String, String)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let mut files = Vec::new();
        for format in std::fs::read_dir(folders()).unwrap() {
            let format = format.unwrap();
            for file in std::fs::read_dir(format.path()).unwrap() {
                let name = |entry: std::fs::DirEntry| entry.file_name().into_string().unwrap();
                files.push((format.file_name().into_string().unwrap(), name(file.unwrap())));
            }
        }
        files.retain(|(_, name)| name != "README.md");
        files.sort();
        files
    })
}

fn folders() -> &'static Path {
    FOLDERS.get_or_init(|| std::env::var_os("FEWBIT_FUZZ_FOLDERS").unwrap_or_default().into())
}

/// One file of a packed folder: its place in [`folder_files`], then its bytes.
pub(crate) fn folder(bytes: &[u8]) {
    thread_local! {
        static WHOLE: RefCell<BTreeMap<String, Vec<u8>>> = const { RefCell::new(BTreeMap::new()) };
    }
    let Some((which, bytes)) = bytes.split_first() else { return };
    let files = folder_files();
    let (format, name) = &files[usize::from(*which) % files.len()];
    let dir = scratch().join("packed").join(format);
    if !dir.is_dir() {
        std::fs::create_dir_all(&dir).unwrap();
        for file in std::fs::read_dir(folders().join(format)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), dir.join(file.file_name())).unwrap();
        }
    }
    let path = dir.join(name);
    let whole = WHOLE.with_borrow_mut(|whole| {
        let read = || std::fs::read(folders().join(format).join(name)).unwrap();
        whole.entry(format!("{format}/{name}")).or_insert_with(read).clone()
    });
    let _back = Back { path: &path, whole: &whole };
    std::fs::write(&path, bytes).unwrap();
    // Manifests of earlier versions are among the seeds: they prove less.
    if name != "manifest.json" {
        let manifest = sound(Manifest::read(&dir)).flatten().unwrap();
        let noticed = sound(manifest.check_files(&dir)).is_none();
        assert_eq!(noticed, bytes != whole, "{format}/{name}: damage that is not noticed");
    }
    if let Some(opened) = sound(open_model(&dir)) {
        read_all(&opened);
    }
    if let Some((config, checkpoint, _)) = sound(open_float(&dir)) {
        for (name, shape) in config.tensors().iter().take(4) {
            sound(checkpoint.weight(name, shape));
        }
    }
}

/// Puts a file back as it was, also when a fault is found.
struct Back<'a> {
    path: &'a Path,
    whole: &'a [u8],
}

impl Drop for Back<'_> {
    fn drop(&mut self) {
        std::fs::write(self.path, self.whole).unwrap();
    }
}

fn read_all(opened: &OpenModel) {
    for (name, shape) in opened.config.tensors().iter().take(64) {
        if opened.contains(name) {
            sound(opened.weight(name, shape));
        }
        sound(opened.quantized(name.strip_suffix(".weight").unwrap_or(name)));
    }
    if opened.has_tokenizer()
        && let Some(tokenizer) = sound(opened.tokenizer())
    {
        use_tokenizer(&tokenizer);
    }
}

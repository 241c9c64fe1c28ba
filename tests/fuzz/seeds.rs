//! Sound files of every kind, to be damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fewbit::export::fewbit::Saved;
use fewbit::export::{Adapter, AdapterHead, Tuned, open_model};
use fewbit::quant::{Learned, ScaleDType};
use fewbit::recipe::builtins;
use fewbit::store::HostTensor;
use fewbit::store::safetensors::{ShardWriter, write_file};

/// A tokenizer of words, with one part of each kind that is set aside, added or put around.
pub(crate) const WORDS: &str = r#"{"version": "1.0", "truncation": null, "padding": null,
 "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"},
  {"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": "0"}, {"type": "Prepend", "prepend": "▁"}]},
 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
  {"type": "Split", "pattern": {"String": ","}, "behavior": "Isolated", "invert": false},
  {"type": "Digits", "individual_digits": true}]},
 "post_processor": {"type": "TemplateProcessing",
  "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
  "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
  "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
 "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
  {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
 "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": true,
  "normalized": false, "special": true}],
 "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"<s>": 0, "</s>": 1, "?": 2, "a": 3, "upon": 4}}}"#;

const WORDPIECE: &str = r###"{"version": "1.0", "added_tokens": [],
 "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
  "strip_accents": null, "lowercase": true}, "pre_tokenizer": {"type": "BertPreTokenizer"},
 "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
 "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
  "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "on": 1, "##ce": 2, "up": 3, "##on": 4, "a": 5}}}"###;

const UNIGRAM: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": {"type": "NFKC"},
 "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
 "post_processor": null, "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
 "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
  "vocab": [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["▁up", -4.5], ["on", -4.0], ["▁a", -2.5]]}}"#;

const BYTE_LEVEL: &str = r#"{"version": "1.0", "added_tokens": [],
 "normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
  {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\p{N}{1,3}| ?[^\\s]+|\\s+(?!\\S)"}, "behavior": "Isolated", "invert": false},
  {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
 "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
 "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
 "model": {"type": "BPE", "dropout": null, "unk_token": "?", "continuing_subword_prefix": "", "end_of_word_suffix": "",
  "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
  "vocab": {"?": 0, "a": 1, "u": 2, "p": 3, "o": 4, "n": 5, "up": 6, "on": 7, "upon": 8, "Ġ": 9},
  "merges": [["u", "p"], ["o", "n"], ["up", "on"]]}}"#;

/// Small tokenizers of every kind.
pub(crate) fn tokenizers() -> Vec<Vec<u8>> {
    [WORDS, WORDPIECE, UNIGRAM, BYTE_LEVEL].map(|text| text.as_bytes().to_vec()).into()
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The config of every family's tiny model.
pub(crate) fn configs() -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(root("tests/parity"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("config.json"))
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

pub(crate) fn recipes() -> Vec<Vec<u8>> {
    builtins().iter().map(|builtin| builtin.text.as_bytes().to_vec()).collect()
}

fn tensors() -> Vec<(String, HostTensor)> {
    let named = |name: &str, tensor| (name.to_owned(), tensor);
    vec![
        named("a.weight", HostTensor::f32([2, 3], &[1.0, -2.0, 3.5, 0.0, 1e-9, 7.0])),
        named("b.scales", HostTensor::bf16_from_f32([3, 1], &[1.0, 2.0, 3.0])),
        named("c.codes", HostTensor::u8([5], &[1, 2, 3, 4, 5])),
        named("d.words", HostTensor::u32([2], &[7, u32::MAX])),
        named("e.position", HostTensor::i64([], &[-5])),
        named("f.empty", HostTensor::f32([0, 4], &[])),
    ]
}

/// Small safetensors files, without and with metadata.
pub(crate) fn safetensors(dir: &Path) -> Vec<Vec<u8>> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    [BTreeMap::new(), metadata]
        .iter()
        .map(|metadata| {
            let path = dir.join("sound.safetensors");
            write_file(&path, &tensors(), metadata).unwrap();
            std::fs::read(path).unwrap()
        })
        .collect()
}

/// Two shards, which an index calls `model-1.safetensors` and `model-2.safetensors`.
pub(crate) fn shards(dir: &Path) -> Vec<Vec<u8>> {
    let mut writer = ShardWriter::create(dir, 36).unwrap();
    for (name, tensor) in tensors() {
        writer.add(&name, &tensor).unwrap();
    }
    let files = writer.finish(&BTreeMap::new()).unwrap();
    files[..files.len() - 1].iter().map(|path| std::fs::read(path).unwrap()).collect()
}

pub(crate) fn indexes() -> Vec<Vec<u8>> {
    let one = |name: &str| (name.to_owned(), "model-1.safetensors".to_owned());
    let two = |name: &str| (name.to_owned(), "model-2.safetensors".to_owned());
    let map: BTreeMap<String, String> =
        [one("a.weight"), one("b.scales"), one("c.codes"), two("d.words"), two("e.position")]
            .into();
    let index = serde_json::json!({"metadata": {"total_size": 62}, "weight_map": map});
    vec![index.to_string().into_bytes()]
}

/// Small GGUF files: every kind of value, every type of block.
pub(crate) fn ggufs() -> Vec<Vec<u8>> {
    use fewbit_gguf::{BlockType, Header, Value, ValueKind};
    let mut header = Header::new();
    for (key, value) in [
        ("general.architecture", Value::from("llama")),
        ("a", Value::U8(1)),
        ("b", Value::I16(-2)),
        ("c", Value::F32(0.5)),
        ("d", Value::Bool(true)),
        ("e", Value::U64(4)),
        ("f", Value::F64(0.25)),
        ("g", Value::texts(["x".to_owned(), "é".to_owned()])),
        ("h", Value::List(ValueKind::List, vec![Value::integers([1]), Value::floats([])])),
    ] {
        header.set(key, value).unwrap();
    }
    for kind in BlockType::ALL {
        header.announce(&format!("{kind}"), &[2, kind.block_len()], kind).unwrap();
    }
    let mut writer = header.start(Vec::new(), Path::new("x")).unwrap();
    for kind in BlockType::ALL {
        let bytes: Vec<u8> = (0..2 * kind.block_bytes()).map(|i| (i * 37) as u8).collect();
        writer.write(&format!("{kind}"), &bytes).unwrap();
    }
    vec![writer.finish().unwrap()]
}

pub(crate) fn documents() -> Vec<Vec<u8>> {
    let texts = [
        "{\"text\": \"Once upon a time\"}\n{\"text\": \"é\\n\", \"id\": 1}\n\n{\"text\": \"\"}\n",
        "[\"one\", \"two\", \"\\ud83d\\ude00\"]",
        "Plain prose.\n[1] With a note.\n",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let texts = [
        "{\"prompt\": \"name: The Mill\\n\", \"completion\": \" a pub\"}\n{\"prompt\": \"\", \"completion\": \"\"}",
        "[{\"instruction\": \"Say\", \"input\": \"x\", \"output\": \"y\"}, {\"instruction\": \"a\", \"output\": \"b\"}]",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": [{\"type\": \"text\", \"text\": \"b\"}]}], \"tools\": \"[{}]\"}",
        "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}], \"system\": \"s\"}",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}

/// The templates of the golden file.
pub(crate) fn chat_templates() -> Vec<Vec<u8>> {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../golden/chat_templates.json")).unwrap();
    let templates = golden["templates"].as_object().unwrap().values();
    templates.map(|entry| entry["source"].as_str().unwrap().as_bytes().to_vec()).collect()
}

/// The adapters that the packed folder at `base` could have.
pub(crate) fn adapters(base: &Path, dir: &Path) -> Vec<Vec<u8>> {
    let opened = open_model(base).unwrap();
    let weights: Vec<_> = (opened.linears().take(2))
        .map(|(name, _)| (name.clone(), opened.quantized(name).unwrap().unwrap()))
        .collect();
    let tuned: Vec<Tuned<'_>> =
        weights.iter().map(|(name, weight)| Tuned { name, base: weight, weight }).collect();
    [ScaleDType::F32, ScaleDType::F16]
        .map(|dtype| {
            let head = AdapterHead { name: "a".to_owned(), ..AdapterHead::default() };
            let path = dir.join("adapter.safetensors");
            let adapter = Adapter::new(head, Learned::default(), dtype, &tuned).unwrap();
            adapter.write(&path).unwrap();
            std::fs::read(path).unwrap()
        })
        .into()
}

/// A block's file with codes, latent weights and a dense tensor.
pub(crate) fn checkpoints(base: &Path, dir: &Path) -> Vec<Vec<u8>> {
    let opened = open_model(base).unwrap();
    let linears = (opened.linears().take(2)).map(|(name, record)| {
        (name.clone(), opened.quantized(name).unwrap().unwrap(), record.method.clone())
    });
    let tensor =
        |name: &str| BTreeMap::from([(name.to_owned(), HostTensor::f32([2], &[0.5, 1.0]))]);
    let saved = Saved {
        linears: linears.collect(),
        dense: tensor("norm.weight"),
        latents: tensor("a.latent"),
        metadata: BTreeMap::from([("error".to_owned(), "0.25".to_owned())]),
    };
    let path = dir.join("block.safetensors");
    saved.write(&path).unwrap();
    vec![std::fs::read(path).unwrap()]
}

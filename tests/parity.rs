//! The model against transformers' logits and against perplexities measured with PyTorch.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor};
use fewbit::data::{TokenStream, Tokenizer, read_documents};
use fewbit::method::{FakeQuant, MethodConfig, RtnConfig, Start, attach};
use fewbit::model::{
    Block, CausalLm, Generation, KvCache, Loader, ModelConfig, Positions, Prompt, RopeScaling,
    Sampler, model_types, open_folder,
};
use fewbit::ops;
use fewbit::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use fewbit::stop::StopFlag;
use fewbit::store::TensorSource;
use fewbit::store::safetensors::Checkpoint;
use fewbit::task::{PplConfig, measure};
use serde::Deserialize;

/// Of the largest logit.
const TOLERANCE: f32 = 1e-4;

struct Loaded {
    dir: PathBuf,
    config: ModelConfig,
    model: CausalLm,
    device: Device,
}

impl Loaded {
    fn open(dir: &Path) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(dir);
        let (config, source) = open_folder(&dir).unwrap();
        let device = Device::flex();
        let dtype = DType::F32;
        let model =
            Loader { config: &config, source: &source, device: &device, dtype }.model().unwrap();
        Self { dir, config, model, device }
    }

    fn reference<T: for<'de> Deserialize<'de>>(&self) -> T {
        let text = std::fs::read_to_string(self.dir.join("reference.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Logits of every position in one pass, one row per token.
    fn logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let positions = Positions::new(&self.config, 0, tokens.len(), DType::F32, &self.device);
        let hidden = self.model.hidden(CausalLm::tokens(&[tokens], &self.device), &positions);
        self.rows(hidden)
    }

    /// The same, fed in pieces through the key and value cache.
    fn cached_logits(&self, tokens: &[u32], pieces: &[usize]) -> Vec<Vec<f32>> {
        let mut caches = vec![KvCache::default(); self.model.blocks.len()];
        let (mut past, mut rows) = (0, Vec::new());
        for len in pieces.iter().copied().chain(std::iter::repeat(1)) {
            let Some(piece) = tokens.get(past..past + len) else { break };
            let positions = Positions::new(&self.config, past, len, DType::F32, &self.device);
            let mut hidden = self.model.embed(CausalLm::tokens(&[piece], &self.device), &positions);
            for (block, cache) in self.model.blocks.iter().zip(&mut caches) {
                hidden = block.forward_tapped(hidden, &positions, Some(cache), &|_, x| x);
            }
            rows.extend(self.rows(self.model.finish(hidden)));
            past += len;
        }
        rows
    }

    fn rows(&self, hidden: Tensor<3>) -> Vec<Vec<f32>> {
        let [batch, seq, d_model] = hidden.dims();
        let logits = self.model.logits(hidden.reshape([batch * seq, d_model]));
        let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
        logits.chunks_exact(self.model.vocab()).map(<[f32]>::to_vec).collect()
    }

    /// Greedy continuation through the cache, past any end token.
    fn greedy(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        self.greedy_together(&[prompt], count).swap_remove(0)
    }

    /// Greedy continuations of prompts that may differ in length, in one batch.
    fn greedy_together(&self, prompts: &[&[u32]], count: usize) -> Vec<Vec<u32>> {
        let Self { model, device, .. } = self;
        let sampler = Sampler::default();
        let how = Generation { model, device, sampler, max_new: count, ends: &[] };
        let mut texts = vec![Vec::new(); prompts.len()];
        let prompts = prompts.iter().map(|tokens| Prompt { tokens, stream: 0 });
        how.batch(&prompts.collect::<Vec<_>>(), &mut |row, token| {
            texts[row].push(token);
            Ok(true)
        })
        .unwrap();
        texts
    }

    /// Logits of documents that share a sequence and do not see each other.
    fn packed_logits(&self, documents: [&[u32]; 2]) -> Vec<Vec<f32>> {
        let tokens = documents.concat();
        let first = documents[0].len();
        let starts: Vec<u32> =
            (0..tokens.len()).map(|place| if place < first { 0 } else { first as u32 }).collect();
        let positions =
            Positions::with_starts(&self.config, 0, &[&starts], DType::F32, &self.device);
        let hidden = self.model.hidden(CausalLm::tokens(&[&tokens], &self.device), &positions);
        self.rows(hidden)
    }
}

/// The largest difference, of the largest logit.
fn close(what: &str, found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().flatten().fold(0.0_f32, |max, logit| max.max(logit.abs()));
    let mut most = 0.0f32;
    for (t, (a, b)) in found.iter().zip(expected).enumerate() {
        let gap = a.iter().zip(b).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(a.len() == b.len() && gap <= TOLERANCE * largest, "{what}: position {t}, {gap}");
        assert_eq!(argmax(a), argmax(b), "{what}: position {t}");
        most = most.max(gap / largest);
    }
    most
}

fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap()
}

// --- transformers --------------------------------------------------------------------------------

#[derive(Deserialize)]
struct TinyReference {
    tokens_a: Vec<u32>,
    tokens_b: Vec<u32>,
    greedy_a: Vec<u32>,
}

/// Every tiny model under `tests/parity`, and in the folder that FEWBIT_PARITY names: logits in one pass
/// and through the cache, and a greedy continuation.
#[test]
fn tiny_models_of_every_family_agree() {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/parity");
    let more = std::env::var_os("FEWBIT_PARITY").map(PathBuf::from);
    let (mut families, mut failed) = (BTreeSet::new(), Vec::new());
    for folder in std::iter::once(own).chain(more) {
        let mut names: Vec<PathBuf> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        for dir in names.into_iter().filter(|dir| dir.join("reference.json").is_file()) {
            match std::panic::catch_unwind(|| tiny_model_agrees(&dir)) {
                Ok(family) => drop(families.insert(family)),
                Err(_) => failed.push(dir),
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
    let known: BTreeSet<String> = model_types().map(str::to_owned).collect();
    assert_eq!(families, known, "a family without a tiny model");
}

#[allow(clippy::print_stdout)] // `--nocapture` shows the rows of docs/models.md
fn tiny_model_agrees(dir: &Path) -> String {
    let loaded = Loaded::open(dir);
    // Rotations that depend on the length of the text: a cache holds those of the shorter one.
    let ropes = loaded.config.arch.spans.iter().filter_map(|span| span.rope.as_ref());
    let scalings: Vec<&RopeScaling> = ropes.map(|rope| &rope.scaling).collect();
    let first = scalings.iter().find_map(|scaling| match scaling {
        RopeScaling::Long { original, .. } => Some(*original as usize + 1),
        _ => None,
    });
    let longest = scalings.iter().find_map(|scaling| match scaling {
        RopeScaling::Dynamic { original, .. } => Some(*original as usize),
        _ => None,
    });
    let reference: TinyReference = loaded.reference();
    let file = Checkpoint::open_file(&loaded.dir.join("reference.safetensors")).unwrap();
    // To transformers, and of the cached to the uncached.
    let mut gaps = [0.0f32; 2];
    for (which, tokens) in [("logits_a", &reference.tokens_a), ("logits_b", &reference.tokens_b)] {
        let expected = file.read(which).unwrap().to_f32().unwrap();
        let expected: Vec<Vec<f32>> =
            expected.chunks_exact(loaded.model.vocab()).map(<[f32]>::to_vec).collect();
        let found = loaded.logits(tokens);
        let gap = close(which, &found, &expected);
        gaps[0] = gaps[0].max(gap);
        for pieces in [&[][..], &[3, 2][..]] {
            let pieces: Vec<usize> = first.into_iter().chain(pieces.iter().copied()).collect();
            let whole = longest.is_none_or(|longest| tokens.len() <= longest);
            if whole && pieces.first().is_none_or(|first| *first <= tokens.len()) {
                let gap = close("cached", &loaded.cached_logits(tokens, &pieces), &found);
                gaps[1] = gaps[1].max(gap);
            }
        }
    }
    assert_eq!(loaded.greedy(&reference.tokens_a, 8), reference.greedy_a);
    // Through a length at which rotations change, where they do: as one pass over the whole text.
    if longest.is_none() {
        let mut text = reference.tokens_b[..10].to_vec();
        for token in loaded.greedy(&text.clone(), 12) {
            assert_eq!(argmax(&loaded.logits(&text)[text.len() - 1]), token as usize, "{text:?}");
            text.push(token);
        }
    }
    // Documents that share a sequence, and texts that are continued together, are as by themselves.
    let short = first.map(|first| first - 1).or(longest).unwrap_or(usize::MAX);
    let [a, b] =
        [&reference.tokens_a[..], &reference.tokens_b[..]].map(|t| &t[..t.len().min(short)]);
    let alone = [loaded.logits(a), loaded.logits(b)].concat();
    close("packed", &loaded.packed_logits([a, b]), &alone);
    let prompts = [&reference.tokens_a[..], &reference.tokens_b[..10], &reference.tokens_a[..3]];
    if longest.is_none() {
        let alone = prompts.map(|prompt| loaded.greedy(prompt, 8));
        assert_eq!(loaded.greedy_together(&prompts, 8), alone);
    }
    // As transformers 4 spelled it.
    if let Ok(old) = std::fs::read_to_string(dir.join("config.old.json")) {
        assert_eq!(ModelConfig::parse(&old).unwrap(), loaded.config);
    }
    let name = dir.file_name().unwrap().to_str().unwrap();
    println!("| {name} | {} | {:.1e} | {:.1e} |", loaded.config.model_type, gaps[0], gaps[1]);
    loaded.config.model_type
}

/// A text that fills the context ends, and those beside it go on.
#[test]
fn a_full_context_ends_one_text_alone() {
    let loaded = Loaded::open(Path::new("datasets/stories260k"));
    let most = loaded.config.max_positions;
    let long: Vec<u32> = (0..most as u32).map(|i| 3 + i % 400).collect();
    let short = &long[..5];
    let texts = loaded.greedy_together(&[&long, short, &long[2..]], 8);
    // One more token is computed from the last position that there is.
    assert_eq!(texts.iter().map(Vec::len).collect::<Vec<_>>(), [1, 8, 3]);
    assert_eq!(texts[1], loaded.greedy(short, 8));
}

// --- the bundled models --------------------------------------------------------------------------

#[derive(Deserialize)]
struct StoryReference {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    last_logits_top5: Vec<(usize, f32)>,
    logits_first8: Vec<f32>,
}

fn story_model_agrees(name: &str) {
    let loaded = Loaded::open(&Path::new("datasets").join(name));
    let reference: StoryReference = loaded.reference();
    let tokenizer = Tokenizer::load(&loaded.dir).unwrap();
    let bos = tokenizer.bos_id().unwrap();
    assert_eq!(bos, loaded.config.bos);
    let prompt: Vec<u32> =
        bos.into_iter().chain(tokenizer.encode(&reference.prompt).unwrap()).collect();
    assert_eq!(prompt, reference.prompt_ids);

    let rows = loaded.logits(&prompt);
    let last = &rows[rows.len() - 1];
    let mut order: Vec<usize> = (0..last.len()).collect();
    order.sort_by(|a, b| last[*b].total_cmp(&last[*a]));
    let limit = TOLERANCE * last[order[0]].abs();
    for (found, (expected, logit)) in order.iter().zip(&reference.last_logits_top5) {
        assert_eq!(found, expected);
        assert!((last[*found] - logit).abs() <= limit, "{found}: {} for {logit}", last[*found]);
    }
    for (found, expected) in last.iter().zip(&reference.logits_first8) {
        assert!((found - expected).abs() <= limit, "{found} for {expected}");
    }
    assert_eq!(loaded.greedy(&prompt, reference.greedy_ids.len()), reference.greedy_ids);

    let whole: Vec<u32> = prompt.iter().chain(&reference.greedy_ids).copied().collect();
    close("cached", &loaded.cached_logits(&whole, &[prompt.len(), 7]), &loaded.logits(&whole));
}

#[test]
fn tinystories_656k_continues_its_prompt() {
    story_model_agrees("tinystories-656k");
}

#[test]
fn stories260k_continues_its_prompt() {
    story_model_agrees("stories260k");
}

// --- perplexity ----------------------------------------------------------------------------------
//
// Protocol of the numbers below: validation.json (100 stories), BOS before each story, no EOS, all
// joined in file order; windows of 256 tokens without overlap, tail dropped, positions from 0, 255
// predictions in each window, BOS between stories predicted too; exp of the mean. Measured with a
// PyTorch harness in f32. Round-to-nearest: asymmetric min-max with zero in range, on every linear
// of the blocks; in groups of 32 inputs, or of the divisor nearest to 32 (43 of 172).

struct Anchor {
    model: &'static str,
    windows: usize,
    full_precision: f64,
    /// Of 4, 3 and 2 bits.
    per_channel: [f64; 3],
    in_groups: [f64; 3],
}

fn anchor_holds(anchor: &Anchor) {
    let folder = Path::new("datasets").join(anchor.model);
    let loaded = Loaded::open(&folder);
    let validation =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("datasets/tinystories/validation.json");
    let documents = read_documents(&validation).unwrap();
    let tokenizer = Tokenizer::load(&loaded.dir).unwrap();
    let stream = TokenStream::build(&documents, &tokenizer, Some(1)).unwrap();
    let within = |what: &str, loaded: &Loaded, expected: f64, tolerance: f64| {
        let task = PplConfig { context: Some(256), ..PplConfig::default() };
        let (model, config, device) = (&loaded.model, &loaded.config, &loaded.device);
        let stop = StopFlag::default();
        let found = measure(model, config, &stream, &task, device, &stop, &mut |_, _| {}).unwrap();
        assert_eq!(found.windows, anchor.windows, "{what}");
        assert_eq!(found.tokens, anchor.windows as u64 * 255, "{what}");
        let off = (found.perplexity / expected - 1.0).abs();
        assert!(off <= tolerance, "{what}: {} instead of {expected}", found.perplexity);
    };
    within("full precision", &loaded, anchor.full_precision, 0.0005);
    for (i, bits) in [4, 3, 2].into_iter().enumerate() {
        let what = format!("{} at {bits} bits", anchor.model);
        let mut quantized = Loaded::open(&folder);
        round_to_nearest(&mut quantized.model, bits, |_| GroupSize::PerChannel);
        within(&what, &quantized, anchor.per_channel[i], 0.002);
        let mut quantized = Loaded::open(&folder);
        round_to_nearest(&mut quantized.model, bits, |inputs| {
            let size = if inputs % 32 == 0 { 32 } else { 43 };
            GroupSize::Of(size.try_into().unwrap())
        });
        within(&format!("{what} in groups"), &quantized, anchor.in_groups[i], 0.002);
    }
}

fn round_to_nearest(model: &mut CausalLm, bits: u8, group_size: impl Fn(usize) -> GroupSize) {
    let bits = Bits::new(bits).unwrap();
    let linears = model.blocks.iter_mut().flat_map(Block::linears_mut);
    for (_, linear) in linears {
        let weight = linear.weight.val().transpose();
        let [out, inputs] = weight.dims();
        let spec =
            QuantSpec { bits, group_size: group_size(inputs), symmetry: Symmetry::Asymmetric };
        let layout = spec.layout([out, inputs]).unwrap();
        let grouped = ops::reshape_grouped(weight, layout.grouped());
        let method = MethodConfig::Rtn(RtnConfig {})
            .init(&Start::new(&spec, &ObserverConfig::default(), &grouped))
            .unwrap();
        let fake_quant = FakeQuant::new(method, layout, bits, DType::F32);
        linear.weight = attach(&linear.weight, fake_quant, false);
    }
}

#[test]
fn perplexity_anchors_of_stories260k() {
    anchor_holds(&Anchor {
        model: "stories260k",
        windows: 178,
        full_precision: 4.2145,
        per_channel: [4.687, 11.01, 493.5],
        in_groups: [4.617, 7.545, 320.2],
    });
}

#[test]
fn perplexity_anchors_of_tinystories_656k() {
    anchor_holds(&Anchor {
        model: "tinystories-656k",
        windows: 88,
        full_precision: 35.4880,
        per_channel: [38.92, 57.43, 1012.0],
        in_groups: [37.00, 45.46, 243.8],
    });
}

//! The model against transformers' logits and against perplexities measured with PyTorch.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor};
use fewbit::data::{TokenStream, Tokenizer, read_documents};
use fewbit::method::{FakeQuant, MethodConfig, RtnConfig, Start, attach};
use fewbit::model::{Block, CausalLm, KvCache, Loader, ModelConfig, Positions, Sampler, generate};
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
    fn open(folder: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder);
        let (config, device) = (ModelConfig::read(&dir).unwrap(), Device::flex());
        let source = Checkpoint::open(&dir).unwrap();
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
            let mut hidden = self.model.embed(CausalLm::tokens(&[piece], &self.device));
            for (block, cache) in self.model.blocks.iter().zip(&mut caches) {
                hidden = block.forward_tapped(hidden, &positions, Some(cache), &|_, x| x);
            }
            rows.extend(self.rows(self.model.norm.forward(hidden)));
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
        let endless = ModelConfig { eos: Vec::new(), ..self.config.clone() };
        let sampler = Sampler { temperature: 0.0, top_p: 1.0, seed: 0 };
        let mut tokens = Vec::new();
        generate(&self.model, &endless, &self.device, prompt, count, sampler, |token| {
            tokens.push(token);
            true
        });
        tokens
    }
}

fn close(what: &str, found: &[Vec<f32>], expected: &[Vec<f32>]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().flatten().fold(0.0_f32, |max, logit| max.max(logit.abs()));
    for (t, (a, b)) in found.iter().zip(expected).enumerate() {
        let gap = a.iter().zip(b).fold(0.0_f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(a.len() == b.len() && gap <= TOLERANCE * largest, "{what}: position {t}, {gap}");
        assert_eq!(argmax(a), argmax(b), "{what}: position {t}");
    }
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

fn tiny_model_agrees(name: &str) {
    let loaded = Loaded::open(&format!("tests/parity/{name}"));
    let reference: TinyReference = loaded.reference();
    let file = Checkpoint::open_file(&loaded.dir.join("reference.safetensors")).unwrap();
    for (which, tokens) in [("logits_a", &reference.tokens_a), ("logits_b", &reference.tokens_b)] {
        let expected = file.read(which).unwrap().to_f32().unwrap();
        let expected: Vec<Vec<f32>> =
            expected.chunks_exact(loaded.model.vocab()).map(<[f32]>::to_vec).collect();
        let found = loaded.logits(tokens);
        close(which, &found, &expected);
        close("cached", &loaded.cached_logits(tokens, &[]), &found);
        close("cached", &loaded.cached_logits(tokens, &[3, 2]), &found);
    }
    assert_eq!(loaded.greedy(&reference.tokens_a, 8), reference.greedy_a);
}

#[test]
fn multi_head_attention_with_a_head_of_its_own() {
    tiny_model_agrees("llama_mha");
}

#[test]
fn grouped_queries_scaled_rope_biases_and_a_tied_head() {
    tiny_model_agrees("llama_gqa_rope3");
}

#[test]
fn weights_stored_in_bf16() {
    tiny_model_agrees("llama_gqa_rope3_bf16");
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
    let loaded = Loaded::open(&format!("datasets/{name}"));
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
    let folder = format!("datasets/{}", anchor.model);
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

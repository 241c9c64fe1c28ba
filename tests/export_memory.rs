//! An export holds one linear at a time, and measures one block at a time. Alone in its process, so
//! that nothing else counts.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too
#![cfg(target_os = "linux")] // where the system tells the peak

mod common;

use std::collections::BTreeMap;

use burn::tensor::{DType, Device};
use common::Place;
use fewbit::error::Result;
use fewbit::export::{Format, FormatsConfig, Gate, OpenModel, open_model, write_opened};
use fewbit::model::WeightSource;
use fewbit::report::memory::peak_gib;
use fewbit::stop::StopFlag;
use fewbit::store::HostTensor;
use fewbit::store::safetensors::ShardWriter;
use fewbit::task::Gauge;
use serde_json::json;

const WIDTH: usize = 512;
const INNER: usize = 1536;
const BLOCKS: usize = 24;

/// A model of 82 million weights in blocks.
fn model(place: &Place) {
    let folder = place.path("model");
    std::fs::create_dir(&folder).unwrap();
    let config = json!({
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": true,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut writer = ShardWriter::create(&folder, 64 << 20).unwrap();
    let mut state = 1_u32;
    let mut add = |name: &str, shape: &[usize]| {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 1e8 - 0.08
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        writer.add(name, &HostTensor::f16_from_f32(shape.to_vec(), &values)).unwrap();
    };
    add("model.embed_tokens.weight", &[64, WIDTH]);
    add("model.norm.weight", &[WIDTH]);
    for block in 0..BLOCKS {
        let at = format!("model.layers.{block}");
        for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
            add(&format!("{at}.{name}.weight"), &[WIDTH, WIDTH]);
        }
        add(&format!("{at}.self_attn.o_proj.weight"), &[WIDTH, WIDTH]);
        add(&format!("{at}.mlp.gate_proj.weight"), &[INNER, WIDTH]);
        add(&format!("{at}.mlp.up_proj.weight"), &[INNER, WIDTH]);
        add(&format!("{at}.mlp.down_proj.weight"), &[WIDTH, INNER]);
        add(&format!("{at}.input_layernorm.weight"), &[WIDTH]);
        add(&format!("{at}.post_attention_layernorm.weight"), &[WIDTH]);
    }
    writer.finish(&BTreeMap::new()).unwrap();
}

/// A packed model without its codes.
struct Dense<'a>(&'a OpenModel);

impl WeightSource for Dense<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.weight(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

#[test]
fn memory_does_not_grow_with_the_number_of_blocks() {
    let place = Place::new();
    model(&place);
    place.write(
        "recipe.toml",
        "output = \"run\"\ndevice = \"cpu\"\nmodel.path = \"model\"\n\
         [quant]\nbits = 4\ngroup_size = 128\nscales = \"f16\"\n\
         [[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n\
         [[stage]]\n[stage.export]\nformat.fewbit = {}\n",
    );
    place.ok(&["train", "--recipe", "recipe.toml"]);
    let opened = open_model(&place.path("run/export/fewbit")).unwrap();
    let (device, stop) = (Device::flex(), StopFlag::default());
    let prompts = Gauge::prompts(None, &opened.config);
    let (progress, text) = (&|_, _| (), None);
    let gauge = Gauge { device: &device, dtype: DType::F32, prompts, text, stop: &stop, progress };
    for format in [Format::Fewbit, Format::CompressedTensors, Format::Mlx] {
        // Computed as the folder will be: with codes, or with the weights they stand for.
        let dense = Dense(&opened);
        let source: &dyn WeightSource = if format == Format::Fewbit { &opened } else { &dense };
        let trained = gauge.measure(&opened.config, source, opened.tap()).unwrap();
        let gate = Gate { gauge: &gauge, trained: &trained };
        let options = FormatsConfig::of(format, &[]).unwrap();
        let target = place.path(format.name());
        write_opened(&opened, format, &options, &target, &gate, "cpu").unwrap();
    }
    // The weights alone are 0.3 GiB as floats, and 40 MiB packed.
    let peak = peak_gib().unwrap();
    assert!(peak < 0.14, "{peak} GiB");
}

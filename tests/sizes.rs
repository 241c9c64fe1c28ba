//! Sizes and counts from a config.json alone, against the tables that papers print.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, datasets};
use fewbit::model::{ModelConfig, ModelShape, Trainable};
use insta::assert_snapshot;
use serde_json::Value;

const PEQA: Trainable = Trainable::Scales { group_size: None };
const LORA: Trainable = Trainable::LoraQueryValue { rank: 4 };

/// A config of the LLaMA family, from width, MLP, blocks and heads.
fn llama(d: u64, ff: u64, blocks: u64, heads: u64) -> String {
    format!(
        r#"{{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_act":"silu",
        "hidden_size":{d},"intermediate_size":{ff},"num_hidden_layers":{blocks},
        "num_attention_heads":{heads},"max_position_embeddings":2048,"rms_norm_eps":1e-6,
        "tie_word_embeddings":false,"vocab_size":32000}}"#
    )
}

const LLAMA_3_8B: &str = r#"{"model_type":"llama","hidden_size":4096,"intermediate_size":14336,
    "num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"vocab_size":128256,
    "attention_bias":false,"max_position_embeddings":8192,"tie_word_embeddings":false}"#;

const MISTRAL_7B: &str = r#"{"model_type":"mistral","hidden_size":4096,"intermediate_size":14336,
    "num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"vocab_size":32000,
    "sliding_window":4096,"tie_word_embeddings":false}"#;

const QWEN2_HALF_B: &str = r#"{"model_type":"qwen2","hidden_size":896,"intermediate_size":4864,
    "num_hidden_layers":24,"num_attention_heads":14,"num_key_value_heads":2,"vocab_size":151936,
    "max_position_embeddings":32768,"tie_word_embeddings":true}"#;

const QWEN3_SMALL: &str = r#"{"model_type":"qwen3","attention_bias":false,"head_dim":128,
    "hidden_size":1024,"intermediate_size":3072,"num_hidden_layers":28,"num_attention_heads":16,
    "num_key_value_heads":8,"vocab_size":151936,"tie_word_embeddings":true}"#;

const GEMMA_2B: &str = r#"{"model_type":"gemma","head_dim":256,"hidden_size":2048,
    "intermediate_size":16384,"num_hidden_layers":18,"num_attention_heads":8,
    "num_key_value_heads":1,"vocab_size":256000}"#;

const GEMMA2_2B: &str = r#"{"model_type":"gemma2","head_dim":256,"hidden_size":2304,
    "intermediate_size":9216,"num_hidden_layers":26,"num_attention_heads":8,
    "num_key_value_heads":4,"vocab_size":256000}"#;

const GPT_J: &str = r#"{"model_type":"gptj","n_embd":4096,"n_head":16,"n_inner":null,"n_layer":28,
    "n_positions":2048,"rotary":true,"rotary_dim":64,"tie_word_embeddings":false,
    "vocab_size":50400}"#;

/// GPT-Neo, from width, blocks and heads.
fn gpt_neo(d: u64, blocks: u64, heads: u64) -> String {
    format!(
        r#"{{"model_type":"gpt_neo","hidden_size":{d},"intermediate_size":null,
        "num_layers":{blocks},"num_heads":{heads},"max_position_embeddings":2048,
        "window_size":256,"vocab_size":50257}}"#
    )
}

/// GPT-2, from width, blocks and heads.
fn gpt2(d: u64, blocks: u64, heads: u64) -> String {
    format!(
        r#"{{"model_type":"gpt2","n_ctx":1024,"n_embd":{d},"n_head":{heads},"n_layer":{blocks},
        "n_positions":1024,"layer_norm_epsilon":1e-5,"vocab_size":50257}}"#
    )
}

/// OPT with tokens as wide as the model, from width, blocks and heads.
fn opt(d: u64, blocks: u64, heads: u64) -> String {
    format!(
        r#"{{"model_type":"opt","do_layer_norm_before":true,"_remove_final_layer_norm":false,
        "ffn_dim":{},"hidden_size":{d},"max_position_embeddings":2048,
        "num_attention_heads":{heads},"num_hidden_layers":{blocks},"vocab_size":50272,
        "word_embed_proj_dim":{d}}}"#,
        4 * d
    )
}

const OPT_350M: &str = r#"{"model_type":"opt","do_layer_norm_before":false,"ffn_dim":4096,
    "_remove_final_layer_norm":false,"hidden_size":1024,"max_position_embeddings":2048,
    "num_attention_heads":16,"num_hidden_layers":24,"vocab_size":50272,
    "word_embed_proj_dim":512}"#;

fn shape(config: &str) -> ModelShape {
    ModelShape::parse(config).unwrap()
}

/// Counts of the published checkpoints, shared matrices once.
#[test]
fn every_family_counts_what_its_checkpoints_hold() {
    for (name, config, parameters) in [
        ("LLaMA-7B", &*llama(4096, 11008, 32, 32), 6_738_415_616),
        ("Llama-3-8B", LLAMA_3_8B, 8_030_261_248),
        ("Mistral-7B", MISTRAL_7B, 7_241_732_096),
        ("Qwen2.5-0.5B", QWEN2_HALF_B, 494_032_768),
        ("Qwen3-0.6B", QWEN3_SMALL, 596_049_920),
        ("Gemma-2B", GEMMA_2B, 2_506_172_416),
        ("Gemma-2-2B", GEMMA2_2B, 2_614_341_888),
        ("GPT-J 6B", GPT_J, 6_050_882_784),
        ("GPT-Neo 125M", &gpt_neo(768, 12, 12), 125_198_592),
        ("GPT-Neo 2.7B", &gpt_neo(2560, 32, 20), 2_651_307_520),
        ("GPT-2", &gpt2(768, 12, 12), 124_439_808),
        ("GPT-2 M", &gpt2(1024, 24, 16), 354_823_168),
        ("GPT-2 L", &gpt2(1280, 36, 20), 774_030_080),
        ("OPT-125M", &opt(768, 12, 12), 125_239_296),
        ("OPT-350M", OPT_350M, 331_196_416),
        ("OPT-1.3B", &opt(2048, 24, 32), 1_315_758_080),
    ] {
        assert_eq!(shape(config).parameters(), parameters, "{name}");
    }
    assert_eq!(shape(&llama(4096, 11008, 32, 32)).linear_weights(), 6_476_005_376);
}

/// PEQA (arXiv 2305.14152), table 4; Llama-3-8B is not in it.
#[test]
fn scales_and_lora_are_counted_as_peqa_does() {
    for (name, config, scales, lora) in [
        ("LLaMA-7B", &*llama(4096, 11008, 32, 32), 1_359_872, Some(2_097_152)),
        ("LLaMA-13B", &llama(5120, 13824, 40, 40), 2_129_920, Some(3_276_800)),
        ("LLaMA-30B", &llama(6656, 17920, 60, 52), 4_147_200, Some(6_389_760)),
        ("LLaMA-65B", &llama(8192, 22016, 80, 64), 6_799_360, Some(10_485_760)),
        ("GPT-J 6B", GPT_J, 1_032_192, None),
        ("GPT-Neo 2.7B", &gpt_neo(2560, 32, 20), 737_280, None),
        ("Llama-3-8B", LLAMA_3_8B, 1_376_256, None),
    ] {
        assert_eq!(shape(config).trainable(PEQA).unwrap(), scales, "{name}");
        if let Some(lora) = lora {
            assert_eq!(shape(config).trainable(LORA).unwrap(), lora, "{name}");
        }
    }
    let millions =
        |config: &str| format!("{:.2} M", shape(config).trainable(LORA).unwrap() as f64 / 1e6);
    assert_eq!(millions(GPT_J), "1.84 M");
    assert_eq!(millions(&gpt_neo(2560, 32, 20)), "1.31 M");
}

/// PEQA (arXiv 2305.14152), table 4: 16, 4 and 3 bits per channel.
#[test]
fn sizes_are_those_of_peqa() {
    for (name, config, sizes) in [
        ("LLaMA-7B", llama(4096, 11008, 32, 32), [13.48, 3.77, 2.96]),
        ("LLaMA-13B", llama(5120, 13824, 40, 40), [26.03, 7.01, 5.42]),
        ("LLaMA-30B", llama(6656, 17920, 60, 52), [65.06, 16.92, 12.90]),
        ("LLaMA-65B", llama(8192, 22016, 80, 64), [130.57, 33.45, 25.35]),
    ] {
        for (bits, expected) in [16, 4, 3].into_iter().zip(sizes) {
            let found = shape(&config).bytes(bits, None).unwrap() as f64 / 1e9;
            assert!((found - expected).abs() < 0.006, "{name}, {bits} bits: {found} GB");
        }
    }
}

/// AlphaTuning (arXiv 2210.03858): counts, and the ratio to full fine-tuning.
#[test]
fn alphas_are_counted_as_alphatuning_does() {
    let largest = Trainable::LargestAlphas { group_size: None };
    let gpt2_m = shape(&gpt2(1024, 24, 16));
    assert_eq!(gpt2_m.trainable(largest).unwrap(), 221_184);
    assert_eq!(shape(&gpt2(1280, 36, 20)).trainable(largest).unwrap(), 414_720);
    assert_eq!(shape(&opt(2048, 24, 32)).trainable(largest).unwrap(), 442_368);
    let all = gpt2_m.trainable(Trainable::Everything).unwrap();
    assert_eq!(format!("{:.0}x", all as f64 / 221_184.0), "1604x");
    let three = Trainable::Alphas { bits: 3, group_size: None };
    assert_eq!(gpt2_m.trainable(three).unwrap(), 3 * 221_184);
}

#[test]
fn groups_cost_a_scale_and_a_zero_point_each() {
    let llama = shape(&llama(4096, 11008, 32, 32));
    let scales = llama.trainable(Trainable::Scales { group_size: Some(128) }).unwrap();
    assert_eq!(scales, llama.linear_weights() / 128);
    let more = llama.bytes(4, Some(128)).unwrap() - llama.bytes(4, None).unwrap();
    assert_eq!(more, (scales - 1_359_872) * 20 / 8);
    assert_eq!(llama.bytes(16, Some(128)).unwrap(), llama.bytes(16, None).unwrap());
}

#[test]
fn training_takes_weights_gradients_and_moments() {
    let llama = shape(&llama(4096, 11008, 32, 32));
    let (n, dense) = (llama.parameters(), llama.bytes(16, None).unwrap());
    let bytes = |bits, what| llama.training_bytes(bits, None, what).unwrap();
    assert_eq!(bytes(16, Trainable::Everything), 14 * n);
    assert_eq!(bytes(16, Trainable::BlockLinears), 2 * n + 12 * 6_476_005_376);
    assert_eq!(bytes(16, LORA), dense + 14 * 2_097_152);
    assert_eq!(bytes(4, PEQA), llama.bytes(4, None).unwrap() + 12 * 1_359_872);
}

/// A rank-r adapter holds r rows of the inputs' width and r columns of the outputs'.
#[test]
fn lora_reaches_into_fused_linears_and_on_to_all() {
    let gpt2 = shape(&gpt2(1024, 24, 16));
    assert_eq!(gpt2.trainable(LORA).unwrap(), 24 * 2 * 4 * 2 * 1024);
    let all = 24 * 4 * (4 + 2 + 5 + 5) * 1024;
    assert_eq!(gpt2.trainable(Trainable::LoraAll { rank: 4 }).unwrap(), all);
    let grouped = shape(LLAMA_3_8B).trainable(LORA).unwrap();
    assert_eq!(grouped, 32 * 4 * (2 * 4096 + 4096 + 1024));
}

#[test]
fn a_model_that_fewbit_runs_has_the_linears_it_loads() {
    for name in ["tinystories-656k", "stories260k"] {
        let folder = datasets().join(name);
        let loaded: u64 = ModelConfig::read(&folder)
            .unwrap()
            .linear_shapes()
            .iter()
            .map(|(_, [out, inputs])| (out * inputs) as u64)
            .sum();
        assert_eq!(ModelShape::read(&folder).unwrap().linear_weights(), loaded, "{name}");
    }
}

#[test]
fn keys_may_be_absent_null_or_under_another_name() {
    let spelled = r#"{"model_type":"gpt2","hidden_size":1024,"num_hidden_layers":24,
        "max_position_embeddings":1024,"vocab_size":50257,"n_inner":4096,
        "num_attention_heads":16}"#;
    assert_eq!(shape(spelled).config(), shape(&gpt2(1024, 24, 16)).config());
    let with = |from: &str, to: &str| shape(&MISTRAL_7B.replacen(from, to, 1)).linears()[2].shape;
    assert_eq!(with("\"num_key_value_heads\":8,", ""), [1024, 4096]);
    assert_eq!(with("\"num_key_value_heads\":8", "\"num_key_value_heads\":null"), [4096; 2]);
    let biased = shape(&LLAMA_3_8B.replacen("_bias\":false", "_bias\":true", 1));
    assert_eq!(biased.biases(), 32 * (4096 + 1024 + 1024 + 4096));
    let bare = opt(2048, 24, 32).replacen('{', "{\"enable_bias\":false,", 1);
    assert_eq!(shape(&bare).biases(), 0);
    let untied = gpt2(1024, 24, 16).replacen('{', "{\"tie_word_embeddings\":false,", 1);
    assert_eq!(shape(&untied).head(), 50257 * 1024);
}

mod command {
    use super::*;

    fn model(name: &str) -> String {
        datasets().join(name).display().to_string()
    }

    /// The row of `table` with this method and group size.
    fn row<'a>(json: &'a Value, table: &str, method: &str, group: &Value) -> &'a Value {
        let mut rows = json[table].as_array().unwrap().iter();
        rows.find(|row| row["method"] == method && row["group_size"] == *group).unwrap()
    }

    #[test]
    fn counts_the_models_that_ship() {
        let place = Place::new();
        for (name, all, scales) in
            [("tinystories-656k", 656_000, 2560), ("stories260k", 260_032, 3000)]
        {
            let json = place.json(&["check", "--config", &model(name), "--json"]);
            assert_eq!(json["parameters"]["all"], all);
            let peqa = row(&json, "trainable", "peqa", &Value::Null);
            assert_eq!(peqa["parameters"], scales);
            assert_eq!(
                (&peqa["f16_bytes"], &peqa["f32_bytes"]),
                (&(2 * scales).into(), &(4 * scales).into())
            );
            assert_eq!(json["sizes"][0]["per_channel"]["bytes"], 2 * all);
            assert_eq!(json["sizes"][0]["per_group"], Value::Null);
        }
        let file = format!("{}/config.json", model("tinystories-656k"));
        let json = place.json(&["check", "--config", &file, "--json"]);
        assert_eq!(json["parameters"]["block_linears"], 393_216);
        assert_eq!(json["block"].as_array().unwrap().len(), 7);
        assert!(place.tree("").is_empty(), "check wrote something");
    }

    #[test]
    fn needs_no_more_than_the_config() {
        let place = Place::new();
        place.write("config.json", llama(4096, 11008, 32, 32));
        let group = ["--group-size", "128", "--lora-rank", "8", "--json"];
        let json = place.json(&[&["check", "--config", "."][..], &group].concat());
        // The adapter of LLaMA-7B in f16: 2.72 MB.
        assert_eq!(row(&json, "trainable", "peqa", &Value::Null)["f16_bytes"], 2_719_744);
        assert_eq!(row(&json, "trainable", "peqa", &128.into())["parameters"], 50_593_792);
        assert_eq!(row(&json, "trainable", "lora_qv", &Value::Null)["parameters"], 4_194_304);
        let full = &row(&json, "training", "full", &Value::Null)["gb"];
        assert_eq!(format!("{:.1}", full.as_f64().unwrap()), "94.3");
        assert_eq!(json["sizes"][2]["bits"], 4);
        let gb = |per: &str| json["sizes"][2][per]["gb"].as_f64().unwrap();
        assert!((gb("per_channel") - 3.77).abs() < 0.006 && gb("per_group") > gb("per_channel"));
    }

    #[test]
    fn prints_columns_that_fit_a_terminal() {
        let place = Place::new();
        place.write("large.json", llama(16384, 53248, 126, 128));
        for config in [&model("tinystories-656k"), "large.json"] {
            let text = place.ok(&["check", "--config", config, "--group-size", "128"]);
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            assert!(text.lines().all(|line| line == line.trim_end()), "{text}");
        }
        let text = place.ok(&["check", "--config", &model("tinystories-656k")]);
        assert_snapshot!(text, @r"
            llama of 2 blocks

            parameters                                       count        share
              linears of the blocks                        393,216      59.94 %
              their biases                                       0       0.00 %
              embeddings                                   262,144      39.96 %
              head (the embedding again)                         0       0.00 %
              norms                                            640       0.10 %
              rest                                               0       0.00 %
              all                                          656,000     100.00 %

            size in GB (1e9 bytes)                     per channel
              linears of 16 bits                          0.001312
              linears of 8 bits                           0.000926
              linears of 4 bits                           0.000729
              linears of 3 bits                           0.000679
              linears of 2 bits                           0.000630
              below 16 bits with a 16-bit scale and a zero point of so many bits for each
              channel or group; everything else stays at 16 bits

            trainable                                   parameters       f16 MB       f32 MB
              PEQA: scales per channel                       2,560        0.005        0.010
              AlphaTuning: alphas per channel                2,560        0.005        0.010
              all alphas of 4 bits per channel              10,240        0.020        0.041
              all alphas of 3 bits per channel               7,680        0.015        0.031
              all alphas of 2 bits per channel               5,120        0.010        0.020
              LoRA of rank 4 on q and v                      3,584        0.007        0.014
              LoRA of rank 4 on all linears                 19,456        0.039        0.078
              full: linears of the blocks                  393,216        0.786        1.573
              full: everything                             656,000        1.312        2.624

            memory in training                                  GB
              PEQA on 4 bits per channel                  0.000759
              LoRA of rank 4 on q and v                   0.001362
              LoRA of rank 4 on all linears               0.001584
              full: linears of the blocks                 0.006031
              full: everything                            0.009184
              stored weights and adapters, and 12 bytes for each trainable parameter
              (its gradient and two moments of Adam in f32); without activations
        ");
    }

    #[test]
    fn refuses_what_it_does_not_know_and_names_it() {
        let place = Place::new();
        let refused = |text: &str, more: &[&str]| {
            place.write("config.json", text);
            place.refused(&[&["check", "--config", "."], more].concat())
        };
        assert_snapshot!(refused("{\"model_type\":\"mamba\"}", &[]), @r"
            exit 3
            error: model_type `mamba` is not supported
              at   ./config.json
              try  a model of type exaone4, gemma, gemma2, gemma3_text, gemma3, gpt2, gpt_neo, gpt_neox, gptj, granite, hyperclovax, llama, ministral3, mistral, olmo2, olmo3, opt, phi, phi3, qwen2, qwen3, qwen3_moe, smollm3
        ");
        assert_snapshot!(refused("{\"hidden_size\":8}", &[]), @r"
            exit 3
            error: config.json has no `model_type`
              at   ./config.json
              try  a Hugging Face model folder with a complete config.json
        ");
        assert_snapshot!(refused(&GPT_J.replacen("n_layer", "layers", 1), &[]), @r"
            exit 3
            error: config.json has no `n_layer`
              at   ./config.json
              try  a Hugging Face model folder with a complete config.json
        ");
        assert_snapshot!(refused(&GPT_J.replacen("28", "\"28\"", 1), &[]), @r#"
            exit 3
            error: `n_layer` is "28"
              at   ./config.json
              try  a whole number from 1 to 4096
        "#);
        assert_snapshot!(refused(&llama(99, 99_999_999, 9, 9), &[]), @r"
            exit 3
            error: `intermediate_size` is 99999999
              at   ./config.json
              try  a whole number from 1 to 1048576
        ");
        assert_snapshot!(refused(&MISTRAL_7B.replacen(":8,", ":5,", 1), &[]), @r"
            exit 3
            error: num_key_value_heads 5 does not divide num_attention_heads 32
              at   ./config.json
              try  a number of heads that does
        ");
        assert_snapshot!(refused(GPT_J, &["--group-size", "96"]), @r"
            exit 3
            error: group size 96 does not divide in_features 4096
              at   attn.q_proj
              try  32, which divides those of every linear, or one scale per channel
        ");
        assert_snapshot!(refused(&llama(64, 172, 5, 8), &["--lora-rank", "65"]), @r"
            exit 3
            error: no adapter of rank 65 for a linear of 64 x 64
              at   q
              try  a rank from 1 to 64
        ");
        assert_snapshot!(refused("[]", &[]), @r"
            exit 3
            error: config.json is not valid: invalid type: sequence, expected a map at line 1 column 0
              at   ./config.json
              try  the model's own config.json
        ");
        assert_snapshot!(place.refused(&["check", "--config", "none"]), @r"
            exit 1
            error: cannot read the file: No such file or directory (os error 2)
              at   none
              try  a config.json, or a folder that holds one
        ");
    }

    #[test]
    fn takes_a_recipe_or_a_config() {
        let place = Place::new();
        let config = &*model("stories260k");
        for (args, hint) in [
            (&["check"][..], "<--recipe <R>|--config <PATH>>"),
            (&["check", "--recipe", "rtn_w4g128", "--config", config], "cannot be used with"),
            (&["check", "--recipe", "rtn_w4g128", "--group-size", "4"], "cannot be used with"),
            (&["check", "--recipe", "rtn_w4g128", "--lora-rank", "4"], "cannot be used with"),
            (&["check", "--config", config, "--set", "a=b"], "cannot be used with"),
            (&["check", "--config", config, "--lora-rank", "0"], "'0'"),
        ] {
            let ended = place.run(args);
            assert_eq!((ended.code, &*ended.out), (2, ""), "{args:?}");
            assert!(ended.err.contains(hint), "{args:?}: {}", ended.err);
        }
    }
}

//! `fewbit report`: a run, or several side by side, as one HTML page.

use std::path::{Path, PathBuf};

use clap::Args;

use super::dialogue::TemplateArgs;
use super::generate::Writer;
use super::{Arithmetic, ModelArgs, output};
use crate::error::{Error, Result};
use crate::model::Sampler;
use crate::page::{self, Sample};
use crate::stop::StopFlag;
use crate::store::folder::write_atomic;
use crate::store::locate::output_file;

/// Where a comparison is written if nothing else is said.
const COMPARISON: &str = "comparison.html";

/// Arguments of `report`.
#[derive(Args, Debug)]
pub(super) struct ReportArgs {
    /// Folders of runs, finished or not; several are set side by side
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page [default: report.html in the run's folder; of several runs, comparison.html]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A text that the float model and each run's export continue, greedily, on the page; may be given
    /// several times
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Say the prompts to the models in the words of their chat template
    #[arg(long, requires = "prompt")]
    chat: bool,
    /// Tokens that they write at most
    #[arg(long, value_name = "N", default_value_t = 48, requires = "prompt")]
    max_new_tokens: usize,
    /// Where they run: auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu
    #[arg(long, default_value = "auto", requires = "prompt")]
    device: String,
}

pub(super) fn run(args: &ReportArgs, stop: &StopFlag) -> Result<()> {
    let usual = match &args.runs[..] {
        [run] => run.join(page::PAGE_FILE),
        _ => PathBuf::from(COMPARISON),
    };
    let path = args.output.clone().unwrap_or(usual);
    let runs = args.runs.iter().map(|run| page::Run::read(run)).collect::<Result<Vec<_>>>()?;
    output_file(&path)?;
    let samples = args.samples(&runs, stop)?;
    write_atomic(&path, page::of(&runs, &samples)?.as_bytes())?;
    output::line(&path.display().to_string())
}

impl ReportArgs {
    /// What the models write: the float model of the first run, then each run's.
    fn samples(&self, runs: &[page::Run], stop: &StopFlag) -> Result<Vec<Sample>> {
        let mut samples: Vec<Sample> = self.prompt.iter().map(|text| Sample::new(text)).collect();
        if samples.is_empty() {
            return Ok(samples);
        }
        let float = runs[0].model().ok_or_else(|| {
            Error::failed("recipe.toml does not say what model was trained")
                .at(self.runs[0].display())
                .fix("the page without --prompt")
        })?;
        let mut add = |name: &str, model: &str| -> Result<()> {
            for (sample, text) in samples.iter_mut().zip(self.texts(model, stop)?) {
                sample.texts.push([name.to_owned(), text]);
            }
            Ok(())
        };
        add("float", &float)?;
        for (run, path) in runs.iter().zip(&self.runs) {
            add(run.name(), &as_model(path))?;
        }
        Ok(samples)
    }

    /// What a model writes behind each prompt.
    fn texts(&self, model: &str, stop: &StopFlag) -> Result<Vec<String>> {
        let (model, device) = (model.to_owned(), self.device.clone());
        let session = ModelArgs { model, device, compute: Arithmetic::F32, bits: None }.open()?;
        let tokenizer = session.tokenizer()?;
        let ends = session.opened.generation()?.ends;
        let max_new = self.max_new_tokens;
        let writer =
            Writer { session: &session, tokenizer: &tokenizer, stop, ends, max_new, stops: &[] };
        let template = self.chat.then(|| TemplateArgs::default().need(&session)).transpose()?;
        let tokens = |text: &String| match &template {
            None => writer.prompt(text),
            Some(template) => writer.question(template, None, text),
        };
        let prompts = self.prompt.iter().map(tokens).collect::<Result<Vec<_>>>()?;
        let answers = writer.together(&session.load()?, &prompts, Sampler::default())?;
        Ok(answers.iter().map(|(answer, ..)| answer.text().to_owned()).collect())
    }
}

/// A run's folder as `--model` takes it: never the name of a model on the hub.
fn as_model(run: &Path) -> String {
    let full = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    full.display().to_string()
}

//! The state of an unfinished training stage: learned parameters, optimizer moments and the step,
//! in one file that is there whole or not at all. (The data order is a function of the step.)

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};

use crate::error::{Error, Result};
use crate::ops;
use crate::store::safetensors::{Checkpoint, write_file};
use crate::store::{HostTensor, TensorSource};
use crate::train::Optimizer;

/// Saves `module`'s learned parameters, `optimizer`'s state, `step`, and `progress`: how the training
/// went, as text.
///
/// # Errors
/// I/O errors; an earlier file stays then.
pub(super) fn save<M: Module>(
    path: &Path,
    module: &M,
    optimizer: &Optimizer,
    step: u64,
    progress: &str,
) -> Result<()> {
    let mut learned = Learned { path: Vec::new(), parameters: Vec::new() };
    module.visit(&mut learned);
    let (moments, optimizer_steps, largest_norm) = optimizer.save();
    let parameters =
        learned.parameters.into_iter().map(|(path, data)| (format!("param:{path}"), data));
    let moments = moments.into_iter().map(|(path, data)| (format!("optim:{path}"), data));
    let tensors: Vec<(String, HostTensor)> = parameters
        .chain(moments)
        .map(|(name, data)| {
            let shape: Vec<usize> = data.shape().iter().copied().collect();
            (name, HostTensor::f32(shape, &data.iter::<f32>().collect::<Vec<f32>>()))
        })
        .collect();
    let metadata = BTreeMap::from([
        ("sha256".to_owned(), hash(&tensors)),
        ("progress".to_owned(), progress.to_owned()),
        ("step".to_owned(), step.to_string()),
        ("optimizer_steps".to_owned(), optimizer_steps.to_string()),
        // Shortest text that reads back as the same number.
        ("largest_norm".to_owned(), largest_norm.to_string()),
    ]);
    write_file(path, &tensors, &metadata)
}

/// Restores what [`save`] wrote into `module` and `optimizer`; gives the module, the step and how the
/// training went.
///
/// # Errors
/// When the file is damaged or belongs to another module.
pub(super) fn load<M: Module>(
    path: &Path,
    module: M,
    optimizer: &mut Optimizer,
    device: &Device,
) -> Result<(M, u64, String)> {
    let damaged = |what: &str| {
        Error::failed(format!("the training state cannot be used: {what}"))
            .at(path.display())
            .fix("remove that file to repeat the stage, or --fresh to start over")
    };
    let file = Checkpoint::open_file(path).map_err(|e| damaged(e.what()))?;
    let tensors: Vec<(String, HostTensor)> = file
        .names()
        .into_iter()
        .map(|name| Ok((name.to_owned(), file.read(name)?)))
        .collect::<Result<_>>()
        .map_err(|e| damaged(e.what()))?;
    if file.file_metadata().get("sha256") != Some(&hash(&tensors)) {
        return Err(damaged("it does not match its hash"));
    }
    let number = |key: &str| file.file_metadata().get(key).and_then(|text| text.parse().ok());
    let (Some(step), Some(optimizer_steps)) = (number("step"), number("optimizer_steps")) else {
        return Err(damaged("it has no step"));
    };
    let largest_norm = file.file_metadata().get("largest_norm").and_then(|text| text.parse().ok());
    let Some(largest_norm) = largest_norm else {
        return Err(damaged("it has no gradient norm"));
    };
    let mut restore = Restore { path: Vec::new(), parameters: BTreeMap::new() };
    let mut moments = Vec::new();
    for (name, tensor) in tensors {
        let data = TensorData::new(tensor.to_f32()?, tensor.shape);
        match name.split_once(':') {
            Some(("param", path)) => {
                restore.parameters.insert(path.to_owned(), data);
            }
            Some(("optim", path)) => moments.push((path.to_owned(), data)),
            _ => return Err(damaged("it holds a tensor of no known kind")),
        }
    }
    optimizer
        .load(moments, optimizer_steps, largest_norm, device)
        .map_err(|e| damaged(e.what()))?;
    let module = module.map(&mut restore);
    if let Some(left) = restore.parameters.keys().next() {
        return Err(damaged(&format!("nothing learns its {left}")));
    }
    let progress = file.file_metadata().get("progress").cloned().unwrap_or_default();
    Ok((module, step, progress))
}

/// The step of a saved state; `None` where there is none that can be read.
pub(super) fn saved_step(path: &Path) -> Option<u64> {
    let file = path.exists().then(|| Checkpoint::open_file(path).ok())??;
    file.file_metadata().get("step")?.parse().ok()
}

/// SHA-256 over names and contents, whatever their order.
fn hash(tensors: &[(String, HostTensor)]) -> String {
    let hashes: BTreeMap<&str, String> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.sha256())).collect();
    let list = hashes.into_iter().flat_map(|(name, hash)| [name.to_owned(), hash]);
    let list = list.collect::<Vec<_>>().join("\n");
    HostTensor::u8([list.len()], list.as_bytes()).sha256()
}

/// Collects every learned parameter by path.
struct Learned {
    path: Vec<String>,
    parameters: Vec<(String, TensorData)>,
}

impl ModuleVisitor for Learned {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.base();
        if value.is_require_grad() {
            self.parameters.push((self.path.join("."), value.inner().into_data()));
        }
    }
}

/// Puts saved parameters back by path.
struct Restore {
    path: Vec<String>,
    parameters: BTreeMap<String, TensorData>,
}

impl ModuleMapper for Restore {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.parameters.remove(&self.path.join(".")) {
            None => param,
            Some(data) => param.map(|old| {
                let value = Tensor::<D>::from_data(data, &old.device().inner());
                let value = ops::laid_out_like(&old.inner(), value);
                Tensor::from_inner(value).require_grad()
            }),
        }
    }
}

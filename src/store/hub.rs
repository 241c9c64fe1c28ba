//! Models from the Hugging Face hub, in the cache that its own tools share.
//!
//! One listing gives the commit and the size and hash of every file. A file comes under the name of its hash
//! with `.incomplete` behind it, goes on where a cut connection or a killed process left it, and takes its
//! place only when size and hash are right. The token goes to the hub's own address, and into no message.

mod cache;
mod http;
mod part;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use wildmatch::WildMatch;

use self::cache::{Cache, is_commit, variable};
use self::http::{Fault, Hub, encoded, encoded_path};
use self::part::{Part, Remote};
use crate::error::{Error, Result};
use crate::report::terminal::Terminal;
use crate::report::{Event, Reporter, size};
use crate::store::folder::{entries, free_bytes};

/// Ends of names that a model's folder may hold and somebody reads.
const WANTED: [&str; 4] = [".json", ".safetensors", ".jinja", "tokenizer.model"];
/// More than the longest listing, less than memory.
const LISTING_BYTES: u64 = 64 << 20;

/// Ends of names that data is read from.
const DATA: [&str; 5] = [".jsonl", ".ndjson", ".json", ".parquet", ".txt"];
/// What the name of a data set of the hub begins with.
pub(super) const SCHEME: &str = "hub:";

/// `owner/name@revision`, which is no folder here.
#[derive(Debug)]
pub(super) struct Id<'a> {
    pub(super) owner: &'a str,
    pub(super) name: &'a str,
    pub(super) revision: &'a str,
    /// A path here that is spelt almost so.
    pub(super) near: Option<String>,
    /// Whether it is a data set, and no model.
    pub(super) is_data: bool,
}

impl fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

impl Id<'_> {
    /// What stands before an id in addresses.
    fn kind(&self) -> [&'static str; 2] {
        if self.is_data { ["datasets", "datasets/"] } else { ["models", ""] }
    }

    /// What it is, for a message.
    fn noun(&self) -> &'static str {
        if self.is_data { "data set" } else { "model" }
    }

    /// What is known before anybody is asked.
    fn absent(&self) -> &'static str {
        if self.is_data { "the data set is not here" } else { "there is no such folder" }
    }

    /// What to try, the path that is here first.
    fn instead(&self, fix: &str) -> String {
        match &self.near {
            Some(near) => format!("{near}, which is here; or {fix}"),
            None => fix.to_owned(),
        }
    }
}

/// What the hub says of a model at a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: String,
    size: u64,
}

/// Whether the user wants no network.
fn is_offline() -> bool {
    let off = ["0", "no", "off", "false"];
    let value = variable("HF_HUB_OFFLINE").map(|value| value.trim().to_lowercase());
    value.is_some_and(|value| !off.contains(&value.as_str()))
}

/// The folder of a model in the cache, got from the hub as far as it is not there.
///
/// # Errors
/// When the hub or the network refuses, the disk is full, or what came is not what was listed.
pub(super) fn snapshot(id: &Id<'_>) -> Result<PathBuf> {
    fetched(id, &|files| {
        let wanted: Vec<Remote> = files.into_iter().filter(|file| is_wanted(&file.name)).collect();
        if wanted.is_empty() {
            let error =
                Error::usage("the hub's model has no file that a model is read from").at(id);
            return Err(error.fix("a model with config.json and *.safetensors"));
        }
        Ok(wanted)
    })
    .map(|(folder, _)| folder)
}

/// The files of a data set in the cache, got from the hub as far as they are not there: the one of the name
/// `files`, those in this folder, or those that the pattern matches; the only one where nothing is said.
///
/// # Errors
/// As [`snapshot`], and when no file is meant, or which one is not clear.
pub(super) fn data_set(id: &Id<'_>, files: Option<&str>) -> Result<Vec<PathBuf>> {
    let meant = |name: &str| files.is_none_or(|files| is_meant(name, files));
    let choose = |all: Vec<Remote>| {
        let all: Vec<Remote> = all.into_iter().filter(|file| is_data(&file.name)).collect();
        let names: Vec<String> = all.iter().map(|file| file.name.clone()).collect();
        let chosen: Vec<Remote> = all.into_iter().filter(|file| meant(&file.name)).collect();
        check_choice(id, files, &names, chosen.len())?;
        Ok(chosen)
    };
    let (folder, names) = fetched(id, &choose)?;
    let names = if let Some(names) = names {
        names
    } else {
        // No list: what the cache has.
        let all: Vec<String> = names_in(&folder)?.into_iter().filter(|n| is_data(n)).collect();
        let chosen: Vec<String> = all.iter().filter(|name| meant(name)).cloned().collect();
        check_choice(id, files, &all, chosen.len())?;
        chosen
    };
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Refuses a choice of nothing, and one that nobody made.
fn check_choice(id: &Id<'_>, files: Option<&str>, names: &[String], chosen: usize) -> Result<()> {
    let shown: Vec<&str> = names.iter().map(String::as_str).take(6).collect();
    let more = if names.len() > shown.len() { ", …" } else { "" };
    let shown = format!("{}{more}", shown.join(", "));
    let what = match (files, names.len(), chosen) {
        (_, 0, _) => "the hub's data set has no file that data is read from".to_owned(),
        (Some(files), _, 0) => format!("the hub's data set has no file `{files}`"),
        (None, 2.., _) => format!("the hub's data set has {} files of data", names.len()),
        _ => return Ok(()),
    };
    let error = Error::usage(what).at(id);
    Err(match names {
        [] => error.fix("one of JSONL, JSON, Parquet or text files"),
        _ => error.fix(format!("{SCHEME}{id}/FILE, a folder, or a pattern with *: {shown}")),
    })
}

/// Whether `files`, a name, a folder or a pattern, means this file.
fn is_meant(name: &str, files: &str) -> bool {
    let folder = format!("{}/", files.trim_end_matches('/'));
    name == files || name.starts_with(&folder) || WildMatch::new(files).matches(name)
}

/// Files of data; what describes a data set is none.
fn is_data(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    is_inside(name)
        && !last.starts_with("dataset_info")
        && !["state.json", "dataset_dict.json"].contains(&last)
        && DATA.iter().any(|end| last.ends_with(end))
}

/// Whether a name stays in its folder.
fn is_inside(name: &str) -> bool {
    !name.contains(['\\', ':'])
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

/// The files below a folder, by their paths in it.
fn names_in(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for path in entries(&next)? {
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(name) = path.strip_prefix(folder) {
                names.push(name.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    names.sort();
    Ok(names)
}

/// What is chosen of a list of files.
type Choose<'a> = &'a dyn Fn(Vec<Remote>) -> Result<Vec<Remote>>;

/// The folder of a model or data set with the files that `choose` takes from the hub's list, and their names;
/// without names where the hub is not asked.
fn fetched(id: &Id<'_>, choose: Choose<'_>) -> Result<(PathBuf, Option<Vec<String>>)> {
    let cache = Cache::of(id);
    if is_offline() {
        let copy = cache.snapshot_of(id.revision).map(|folder| (folder, None));
        return copy.ok_or_else(|| {
            let what =
                format!("{}, nor a copy in the cache, and HF_HUB_OFFLINE is set", id.absent());
            Error::usage(what).at(id).fix(id.instead("unset it, or give a local folder"))
        });
    }
    let mut screen = Terminal::new();
    if let Some(text) = doubt(id) {
        screen.emit(&Event::Note { text });
    }
    let hub = Hub::from_environment();
    let (commit, files) = match hub.persist(&id.to_string(), || list(&hub, id)) {
        Ok(listing) => listing,
        Err(Fault::Unreachable(what)) => {
            let Some(copy) = cache.snapshot_of(id.revision) else {
                return Err(hub.unreachable(id, &what));
            };
            let text = format!("the hub cannot be reached ({what}): {id} is the copy in the cache");
            screen.emit(&Event::Warning { text });
            return Ok((copy, None));
        }
        Err(Fault::Lasting(error)) => return Err(error),
        Err(Fault::Passing { what, .. }) => return Err(Error::failed(what).at(id)),
    };
    let files = choose(files)?;
    let missing = |remote: &&Remote| !cache.blob(&remote.hash).is_file();
    let missing: Vec<&Remote> = files.iter().filter(missing).collect();
    announce(id, &cache, &missing, &mut screen)?;
    for remote in missing {
        get(&hub, id, &commit, remote, &cache, &mut screen)?;
    }
    for remote in &files {
        cache.link(&commit, &remote.name, &remote.hash)?;
    }
    // Last: what a revision stands for is all there.
    cache.note(id.revision, &commit)?;
    let names = files.into_iter().map(|remote| remote.name).collect();
    Ok((cache.snapshot(&commit), Some(names)))
}

/// Why an id may be a path that is not spelt right.
fn doubt(id: &Id<'_>) -> Option<String> {
    let here = match &id.near {
        Some(near) => format!(" ({near} is here)"),
        None if Path::new(id.owner).is_dir() => " here".to_owned(),
        None => return None,
    };
    Some(format!("there is no folder {id}{here}; asking the hub for {id}"))
}

/// The commit and its files.
fn list(hub: &Hub, id: &Id<'_>) -> Result<(String, Vec<Remote>), Fault> {
    let Id { owner, name, revision, .. } = id;
    let [kind, _] = id.kind();
    let path = format!("/api/{kind}/{owner}/{name}/revision/{}?blobs=true", encoded(revision));
    let mut reply = hub.get(id, &path, 0)?;
    let text = reply.body_mut().with_config().limit(LISTING_BYTES).read_to_vec();
    let text =
        text.map_err(|error| Fault::Passing { what: error.to_string(), after: None, came: 0 })?;
    let listing: Listing =
        serde_json::from_slice(&text).map_err(|_| hub.odd(id, "a list of files that is none"))?;
    if !is_commit(&listing.sha) {
        return Err(hub.odd(id, "a commit that is none"));
    }
    let inside = listing.siblings.into_iter().filter(|file| is_inside(&file.rfilename));
    let files = inside.map(|file| {
        let (size, hash) = match file.lfs {
            Some(Large { sha256, size }) => (Some(size), Some(sha256)),
            None => (file.size, file.blob_id),
        };
        let hash = hash.filter(|hash| {
            matches!(hash.len(), 40 | 64) && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
        let remote = size.zip(hash);
        let remote = remote.map(|(size, hash)| Remote { name: file.rfilename, size, hash });
        remote.ok_or_else(|| hub.odd(id, "a list of files without their sizes and hashes"))
    });
    Ok((listing.sha, files.collect::<Result<_, Fault>>()?))
}

/// Files of the model itself: what lies in folders is for other programs, and no name leads out.
fn is_wanted(name: &str) -> bool {
    !name.starts_with('.')
        && !name.contains(['/', '\\', ':'])
        && WANTED.iter().any(|end| name.ends_with(end))
}

/// Says what will come, once there is room for it.
fn announce(id: &Id<'_>, cache: &Cache, missing: &[&Remote], screen: &mut Terminal) -> Result<()> {
    let there = |remote: &Remote| {
        std::fs::metadata(cache.part(&remote.hash)).map_or(0, |part| part.len().min(remote.size))
    };
    let (all, there) = missing
        .iter()
        .fold((0, 0), |(all, have), remote| (all + remote.size, have + there(remote)));
    if missing.is_empty() {
        return Ok(());
    }
    if let Some(free) = free_bytes(cache.root()).filter(|free| *free < all - there) {
        return Err(Error::preflight(format!(
            "the files take {} more on disk, and {} are free",
            size(all - there),
            size(free)
        ))
        .at(cache.root().display())
        .fix("free some space, or HF_HOME on another disk"));
    }
    let files =
        if missing.len() == 1 { "1 file".into() } else { format!("{} files", missing.len()) };
    let rest = match there {
        0 => String::new(),
        there => format!(", {} of it here already", size(there)),
    };
    let text = format!("getting {id} from the hub: {files}, {}{rest}", size(all));
    screen.emit(&Event::Note { text });
    Ok(())
}

/// Gets one file whole.
fn get(
    hub: &Hub,
    id: &Id<'_>,
    commit: &str,
    remote: &Remote,
    cache: &Cache,
    screen: &mut Terminal,
) -> Result<()> {
    let wait = || {
        let text = format!("waiting for another process that gets {}", remote.name);
        screen.emit(&Event::Note { text });
    };
    let _lock = cache.lock(&remote.hash, wait)?;
    let blob = cache.blob(&remote.hash);
    if blob.is_file() {
        return Ok(()); // that process got it
    }
    let Id { owner, name, .. } = id;
    let [_, prefix] = id.kind();
    let path = format!("/{prefix}{owner}/{name}/resolve/{commit}/{}", encoded_path(&remote.name));
    let mut part = Part::open(remote, cache.part(&remote.hash))?;
    let outcome = hub.persist(&remote.name, || {
        if !part.is_full() {
            go_on(hub, id, &path, remote, &mut part, screen)?;
        }
        if part.finish(&blob)? {
            return Ok(());
        }
        let what = "what an earlier process left of it is damaged".to_owned();
        Err(Fault::Passing { what, after: Some(std::time::Duration::ZERO), came: 0 })
    });
    outcome.map_err(|fault| match fault {
        Fault::Lasting(error) => error.at(id),
        Fault::Unreachable(what) => hub.unreachable(id, &what),
        Fault::Passing { what, .. } => Error::failed(what).at(id),
    })
}

/// One request for what is missing of a file.
fn go_on(
    hub: &Hub,
    id: &Id<'_>,
    path: &str,
    remote: &Remote,
    part: &mut Part<'_>,
    screen: &mut Terminal,
) -> Result<(), Fault> {
    let mut reply = hub.get(id, path, part.have())?;
    let status = reply.status().as_u16();
    // Asked for the rest and given the whole, or none: from the start.
    if part.have() > 0 && status != 206 {
        part.restart()?;
    }
    let before = part.have();
    let passing = |what: String, came| Fault::Passing { what, after: None, came };
    if status == 416 {
        return Err(passing("the hub has no more of it".to_owned(), 0));
    }
    if let Some(length) = reply.body().content_length()
        && before + length != remote.size
    {
        let (listed, length) = (remote.size, before + length);
        let what = format!("the file has {length} bytes, and the hub lists {listed}");
        let error = Error::failed(what).at(&remote.name);
        return Err(error.fix("the same command again, or another revision").into());
    }
    let verb = "download".to_owned();
    let broken = part.fill(&mut reply.body_mut().as_reader(), |have| {
        let detail = format!("MB of {}", remote.name);
        let (done, of) = (have >> 20, remote.size.div_ceil(1 << 20));
        screen.emit(&Event::Progress { verb: verb.clone(), done, of, detail });
    })?;
    if part.is_full() {
        return Ok(());
    }
    let why = broken.map_or_else(|| "it ended".to_owned(), |error| error.to_string());
    let (have, of) = (size(part.have()), size(remote.size));
    Err(passing(format!("the connection broke after {have} of {of} ({why})"), part.have() - before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_files_are_those_of_the_model_itself() {
        for yes in ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model"] {
            assert!(is_wanted(yes), "{yes}");
        }
        for no in ["onnx/config.json", "../config.json", ".hidden.json", "a\\b.json", "README.md"] {
            assert!(!is_wanted(no), "{no}");
        }
        for yes in ["data/train-00000.parquet", "a.jsonl", "x/y/z.json"] {
            assert!(is_data(yes), "{yes}");
        }
        for no in
            ["../a.jsonl", "a/../b.json", "/a.json", "README.md", ".a.json", "dataset_infos.json"]
        {
            assert!(!is_data(no), "{no}");
        }
        assert!(is_meant("data/a.json", "data") && is_meant("data/a.json", "data/a*"));
        assert!(!is_meant("data2/a.json", "data") && is_meant("a.json", "a.json"));
    }
}

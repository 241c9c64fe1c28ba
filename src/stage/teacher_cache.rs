//! What a teacher says of the windows that a training will draw, computed once and kept in a file: of each
//! token its likeliest next ones, and the mass of all others.
//!
//! The file is a head (a line that says what it is, and a line with the fingerprint of all that its numbers
//! follow from) and a record of one length for each window, with a hash of its own. A run that was stopped
//! while it wrote, and a file with damage, go on from the first record that is not whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::batch::{Feed, Said};
use super::context::StageContext;
use super::corpus::Data;
use super::logits::{chunks, flat};
use super::states::CACHE_FILE;
use super::teacher::Teacher;
use crate::data::Order;
use crate::error::{Error, Result};
use crate::model::{Forward, Positions};
use crate::ops::{Likely, likeliest};
use crate::report::{Event, Reporter};
use crate::store::hex;

/// The first line.
const HEAD: &[u8] = b"fewbit teacher, likeliest tokens, 1\n";
/// Bytes of a fingerprint in hex and the end of its line.
const FINGERPRINT: usize = 65;
/// Bytes of a record's hash.
const HASH: usize = 8;

/// Where the numbers of a teacher come from.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherFrom {
    /// The float model, at each step.
    #[default]
    Model,
    /// A file of what it said of every window once, before the first step.
    Cached,
}

impl TeacherFrom {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
    pub(super) fn is_model(&self) -> bool {
        *self == Self::Model
    }
}

/// What is kept of each token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Kept {
    /// How many of its likeliest next tokens.
    pub k: usize,
    /// At this temperature.
    pub temperature: f64,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Tokens of a window.
    pub length: usize,
}

impl Kept {
    fn k(&self) -> usize {
        self.k.min(self.vocab)
    }

    /// Whether ids take two bytes.
    fn is_short(&self) -> bool {
        self.vocab <= 1 << 16
    }

    /// Bytes of a window.
    pub(super) fn record(&self) -> usize {
        let id = if self.is_short() { 2 } else { 4 };
        self.length * (self.k() * (id + 4) + 4) + HASH
    }

    fn encode(&self, likely: &Likely) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.record());
        for id in &likely.ids {
            let wide = id.to_le_bytes();
            bytes.extend_from_slice(if self.is_short() { &wide[..2] } else { &wide });
        }
        for log in likely.log_p.iter().chain(&likely.log_rest) {
            bytes.extend_from_slice(&log.to_le_bytes());
        }
        bytes
    }

    fn decode(&self, bytes: &[u8]) -> Likely {
        let (k, count) = (self.k(), self.length * self.k());
        let (ids, rest) = bytes.split_at(count * if self.is_short() { 2 } else { 4 });
        let ids = if self.is_short() {
            ids.as_chunks::<2>().0.iter().map(|id| u16::from_le_bytes(*id).into()).collect()
        } else {
            ids.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).collect()
        };
        let logs: Vec<f32> =
            rest.as_chunks::<4>().0.iter().map(|log| f32::from_le_bytes(*log)).collect();
        let (log_p, log_rest) = logs.split_at(count);
        Likely { k, ids, log_p: log_p.to_vec(), log_rest: log_rest.to_vec() }
    }
}

/// The file.
pub(super) struct TeacherCache {
    file: File,
    path: PathBuf,
    kept: Kept,
    /// The place of each window's record, for all that will be drawn.
    places: BTreeMap<u32, usize>,
    /// Windows in the order of their records, and how many of them are there.
    windows: Vec<u32>,
    whole: usize,
}

impl TeacherCache {
    /// Opens the file in the folder of a stage, or begins it, for these windows: ascending, each once. What is
    /// there is used where it follows from the same `facts`, as far as it is whole.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub(super) fn open(dir: &Path, kept: Kept, windows: Vec<u32>, facts: &str) -> Result<Self> {
        let path = dir.join(CACHE_FILE);
        let failed = |e: &std::io::Error| Error::io("open", &path, e);
        let list: Vec<u8> = windows.iter().flat_map(|window| window.to_le_bytes()).collect();
        let facts = format!("{facts}\n{kept:?}\n{}", hex(&Sha256::digest(&list)));
        let head = [HEAD, hex(&Sha256::digest(facts)).as_bytes(), b"\n"].concat();
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| failed(&e))?;
        let places = windows.iter().copied().zip(0..).collect();
        let mut cache = Self { file, path: path.clone(), kept, places, windows, whole: 0 };
        let mut found = vec![0; head.len()];
        if (&cache.file).read_exact(&mut found).is_err() || found != head {
            cache.file.set_len(0).map_err(|e| failed(&e))?;
            cache.write(0, &head)?;
        }
        while cache.whole < cache.windows.len() && cache.record(cache.whole)?.is_some() {
            cache.whole += 1;
        }
        // What follows is no record, or that of a window behind one.
        cache.file.set_len(cache.start(cache.whole)).map_err(|e| failed(&e))?;
        Ok(cache)
    }

    /// The file of what `teacher` says of all windows that steps will draw, from the stage's folder as far as it is
    /// there.
    ///
    /// # Errors
    /// As [`TeacherCache::open`] and [`TeacherCache::fill`]; when a signal came.
    pub(super) fn filled(
        kept: Kept,
        (verb, steps): (&str, u64),
        order: &Order,
        teacher: &Teacher,
        ctx: &mut StageContext<'_>,
    ) -> Result<Self> {
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let drawn: BTreeSet<u32> = (0..steps).flat_map(|step| order.batch(step)).collect();
        let tuned = ctx.model.tuned.iter();
        let tuned = tuned.map(|(name, tensor)| format!("{name} {}", tensor.sha256()));
        let facts = [
            ctx.provenance.model_sha256.clone(),
            tokens_hash(&corpus.stream.tokens),
            format!("seed {} stage {} {:?} {}", ctx.seed, ctx.stage, ctx.compute, ctx.device.name),
        ];
        let facts: Vec<String> = facts.into_iter().chain(tuned).collect();
        let mut cache = Self::open(ctx.dir, kept, drawn.into_iter().collect(), &facts.join("\n"))?;
        let (config, device) = (&ctx.model.config, &ctx.device.device);
        let positions = Positions::new(config, 0, corpus.length, ctx.compute, device);
        while let [done, all] = cache.windows()
            && done < all
        {
            ctx.stop.check()?;
            let detail = format!("the teacher has said {done}/{all}");
            let verb = verb.to_owned();
            ctx.report.emit(&Event::Progress { verb, done: 0, of: steps, detail });
            let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
            let feed = Feed::new(ctx, corpus, &positions);
            teacher.with(ctx, |model| cache.fill(model, &feed))?;
        }
        Ok(cache)
    }

    /// How many windows it holds, and of how many.
    pub(super) fn windows(&self) -> [usize; 2] {
        [self.whole, self.windows.len()]
    }

    fn start(&self, place: usize) -> u64 {
        (HEAD.len() + FINGERPRINT) as u64 + place as u64 * self.kept.record() as u64
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut file = &self.file;
        let written = file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(bytes));
        written.map_err(|e| Error::io("write", &self.path, &e))
    }

    /// A record's numbers; `None` where it is not whole.
    fn record(&self, place: usize) -> Result<Option<Vec<u8>>> {
        let mut file = &self.file;
        let mut bytes = Vec::with_capacity(self.kept.record());
        file.seek(SeekFrom::Start(self.start(place)))
            .and_then(|_| file.take(self.kept.record() as u64).read_to_end(&mut bytes))
            .map_err(|e| Error::io("read", &self.path, &e))?;
        if bytes.len() < self.kept.record() {
            return Ok(None);
        }
        let hash = bytes.split_off(bytes.len() - HASH);
        Ok((hash == self.hash(place, &bytes)).then_some(bytes))
    }

    fn hash(&self, place: usize, bytes: &[u8]) -> [u8; HASH] {
        let sum = Sha256::new().chain_update(self.windows[place].to_le_bytes()).chain_update(bytes);
        std::array::from_fn(|i| sum.clone().finalize()[i])
    }

    /// Adds some of what is missing, as `teacher` says it: as many windows as go through it at once.
    ///
    /// # Errors
    /// When weights cannot be read, or the file cannot be written: what is there stays.
    pub(super) fn fill(&mut self, teacher: &dyn Forward, feed: &Feed<'_>) -> Result<()> {
        let next =
            self.windows[self.whole..].iter().take(teacher.batches_at_once(self.kept.length));
        // A window's numbers do not depend on what it is computed beside.
        let batches: Vec<_> = next.map(|window| feed.windows(&[*window])).collect();
        let inputs = batches.iter().map(|batch| (batch.tokens(), batch.positions())).collect();
        for hidden in teacher.streams(inputs)? {
            let hidden = flat(hidden);
            let mut likely = Likely::default();
            for range in chunks(hidden.dims()[0], teacher.ends().vocab()) {
                let logits = teacher.ends().logits(hidden.clone().slice_dim(0, range));
                likely.extend(&likeliest(logits, self.kept.k, self.kept.temperature));
            }
            self.add(&likely)?;
        }
        self.file.sync_all().map_err(|e| Error::io("sync", &self.path, &e))
    }

    fn add(&mut self, likely: &Likely) -> Result<()> {
        let mut bytes = self.kept.encode(likely);
        bytes.extend_from_slice(&self.hash(self.whole, &bytes));
        self.write(self.start(self.whole), &bytes)?;
        self.whole += 1;
        Ok(())
    }

    /// What the teacher says of windows, one behind the other.
    ///
    /// # Errors
    /// When the file cannot be read, or was changed.
    pub(super) fn of(&self, windows: &[u32]) -> Result<Said> {
        let mut all = Likely::default();
        for window in windows {
            let place = self.places.get(window).copied().filter(|place| *place < self.whole);
            let bytes = place.map(|place| self.record(place)).transpose()?.flatten();
            let bytes = bytes.ok_or_else(|| {
                Error::failed("the teacher's cache was changed while it was used")
                    .at(self.path.display())
                    .fix("the same command again: what is damaged is computed again")
            })?;
            all.extend(&self.kept.decode(&bytes));
        }
        Ok(Said { likely: all, temperature: self.kept.temperature })
    }
}

/// The SHA-256 of token ids.
fn tokens_hash(tokens: &[u32]) -> String {
    let mut sum = Sha256::new();
    for token in tokens {
        sum.update(token.to_le_bytes());
    }
    hex(&sum.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(vocab: usize) -> Kept {
        Kept { k: 3, temperature: 1.0, vocab, length: 4 }
    }

    fn likely(window: u32) -> Likely {
        let value = |i: u32| (window * 12 + i) as f32;
        Likely {
            k: 3,
            ids: (0..12).map(|i| window + i).collect(),
            log_p: (0..12).map(value).collect(),
            log_rest: (12..16).map(value).collect(),
        }
    }

    fn filled(dir: &Path, kept: Kept, facts: &str) -> (TeacherCache, usize) {
        let mut cache = TeacherCache::open(dir, kept, vec![2, 5, 9], facts).unwrap();
        let [found, of] = cache.windows();
        for place in found..of {
            let window = cache.windows[place];
            cache.add(&likely(window)).unwrap();
        }
        (cache, found)
    }

    #[test]
    fn what_was_kept_comes_back_whatever_the_size_of_ids() {
        for vocab in [100, 1 << 17] {
            let dir = tempfile::tempdir().unwrap();
            let (cache, found) = filled(dir.path(), kept(vocab), "a");
            assert_eq!(found, 0);
            let mut both = likely(9);
            both.extend(&likely(2));
            assert_eq!(cache.of(&[9, 2]).unwrap().likely, both);
            assert!(cache.of(&[3]).is_err());
            assert_eq!(filled(dir.path(), kept(vocab), "a").1, 3);
            // Another teacher, text or number of tokens.
            assert_eq!(filled(dir.path(), kept(vocab), "b").1, 0);
            assert_eq!(filled(dir.path(), Kept { k: 2, ..kept(vocab) }, "b").1, 0);
        }
    }

    /// Whatever is cut off or changed is computed again, and nothing else is believed.
    #[test]
    fn damage_is_found_and_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CACHE_FILE);
        drop(filled(dir.path(), kept(100), "a"));
        let bytes = std::fs::read(&path).unwrap();
        let head = HEAD.len() + FINGERPRINT;
        assert_eq!(bytes.len(), head + 3 * kept(100).record());
        for at in (0..bytes.len()).step_by(7) {
            let whole = at.saturating_sub(head) / kept(100).record();
            std::fs::write(&path, &bytes[..at]).unwrap();
            assert_eq!(filled(dir.path(), kept(100), "a").1, whole, "cut at {at}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, &damaged).unwrap();
            assert_eq!(filled(dir.path(), kept(100), "a").1, whole, "changed at {at}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        let (cache, _) = filled(dir.path(), kept(100), "a");
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = cache.of(&[9]).err().unwrap().to_string();
        assert!(error.lines().count() == 3 && error.contains(CACHE_FILE), "{error}");
    }
}

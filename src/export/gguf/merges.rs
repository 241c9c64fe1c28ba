//! The merges of a tokenizer: listed in the file, or made from the scores of its pieces.
//!
//! Of scores, every way to build a piece from two others is a merge, best score of the union first.
//! Among equal scores llama.cpp takes the pair that stands further left in the text, which no list of
//! merges can say; here the piece with the smaller id goes first, and of the ways to build it the one
//! with the longer left part, which is what merging from the left leaves behind. Two pieces of one
//! file rarely share a score; a file whose pieces all share one is refused.

use std::collections::{BTreeSet, HashMap};

use super::keys::{Keys, TOKENS, missing};
use super::pieces::PieceKind;
use crate::error::{Error, Result};

pub(super) const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
/// The longest piece that is taken apart; real ones have a tenth of it.
const LONGEST_PIECE: usize = 1024;
pub(super) type Merges = Vec<(String, String)>;

/// The merges of a `gpt2` tokenizer; of a repeated one the first counts.
pub(super) fn merges(keys: Keys<'_>, pieces: &[String]) -> Result<Merges> {
    let known: BTreeSet<&str> = pieces.iter().map(String::as_str).collect();
    let mut taken = BTreeSet::new();
    let mut merges = Vec::new();
    for (rank, text) in keys.texts(MERGES)?.ok_or_else(|| missing(MERGES))?.iter().enumerate() {
        let bad = |what: &str| {
            Error::preflight(format!("`{MERGES}` {rank}, `{}`, {what}", text.escape_debug()))
        };
        // The first part may be a space itself.
        let cut = text.char_indices().skip(1).find(|(_, letter)| *letter == ' ');
        let (left, right) = match cut {
            Some((at, _)) => (&text[..at], &text[at + 1..]),
            None => return Err(bad("is no pair")),
        };
        let union = [left, right].concat();
        if [left, right, union.as_str()].iter().any(|piece| !known.contains(piece)) {
            return Err(bad(&format!("names a piece that `{TOKENS}` lacks")));
        }
        if taken.insert((left, right)) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}

/// Every way to build a piece from two, best first.
pub(super) fn merges_of_scores(
    pieces: &[String],
    kinds: &[PieceKind],
    scores: &[f32],
) -> Result<Merges> {
    let ids: HashMap<&str, usize> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.as_str(), id)).collect();
    let mut ways: Vec<(usize, usize)> = Vec::new();
    for (id, (piece, kind)) in pieces.iter().zip(kinds).enumerate() {
        // The others are found in a text before it is merged.
        if !matches!(kind, PieceKind::Normal | PieceKind::Unused | PieceKind::Byte) {
            continue;
        }
        if piece.len() > LONGEST_PIECE {
            return Err(Error::preflight(format!(
                "`{TOKENS}` {id} is a piece of {} bytes; {LONGEST_PIECE} are possible",
                piece.len()
            )));
        }
        let cuts = piece.char_indices().skip(1).map(|(at, _)| at).filter(|at| {
            let (left, right) = piece.split_at(*at);
            ids.contains_key(left) && ids.contains_key(right)
        });
        ways.extend(cuts.map(|at| (id, at)));
    }
    let first = ways.first().map(|(id, _)| *id);
    if let Some(first) = first
        && ways.iter().any(|(id, _)| *id != first)
        && ways.iter().all(|(id, _)| scores[*id].total_cmp(&scores[first]).is_eq())
    {
        return Err(Error::preflight(format!(
            "`{SCORES}` gives every piece the same score, so nothing says which to merge first"
        ))
        .fix("convert the model again, from a folder with its tokenizer.model"));
    }
    ways.sort_by(|(a, a_cut), (b, b_cut)| {
        let by_score = scores[*b].total_cmp(&scores[*a]);
        by_score.then(a.cmp(b)).then(b_cut.cmp(a_cut))
    });
    let parts = |(id, at): (usize, usize)| {
        let (left, right) = pieces[id].split_at(at);
        (left.to_owned(), right.to_owned())
    };
    Ok(ways.into_iter().map(parts).collect())
}

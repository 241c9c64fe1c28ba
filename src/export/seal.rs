//! A text that tells whether it is as it was written: its last member is the SHA-256 of all of it, with
//! zeros in place of the hash itself.

use sha2::{Digest, Sha256};

use crate::store::hex;

/// What stands for the hash while the hash is taken.
pub(super) const BLANK: &str = "0000000000000000000000000000000000000000000000000000000000000000";

fn member(hash: &str) -> String {
    format!("\"sha256\": \"{hash}\"")
}

/// The text with its hash in place of the last [`BLANK`].
pub(super) fn sealed(text: &str) -> Option<String> {
    replaced(text, BLANK, &hex(&Sha256::digest(text)))
}

/// Whether a text that says `hash` of itself is the one that was sealed.
pub(super) fn is_whole(text: &str, hash: &str) -> bool {
    let blank = replaced(text, hash, BLANK);
    blank.is_some_and(|blank| hex(&Sha256::digest(blank)) == hash)
}

fn replaced(text: &str, from: &str, to: &str) -> Option<String> {
    let (before, after) = text.rsplit_once(&member(from))?;
    Some(format!("{before}{}{after}", member(to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_whole_or_not() {
        let text = format!("{{\n  \"a\": \"{BLANK}\",\n  {}\n}}\n", member(BLANK));
        let hash = hex(&Sha256::digest(&text));
        let sealed = sealed(&text).unwrap();
        assert!(sealed.contains(BLANK) && is_whole(&sealed, &hash));
        for other in ["", "{}", &sealed[1..], &text, &sealed.replace('a', "b")] {
            assert!(!is_whole(other, &hash), "{other}");
        }
        assert!(!is_whole(&sealed.to_uppercase(), &hash.to_uppercase()));
    }
}

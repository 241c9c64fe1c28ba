//! Fields side by side in a width, shortened where they have to be; longer texts wrapped.

/// Width of the first column; what follows `plan`, `model`, `done` starts here.
pub(super) const LABEL: usize = 10;
/// Width of the column after it in lines about a stage or a block: `reconstruct`.
pub(super) const VERB: usize = 11;

/// A part of a line, and its shorter form.
#[derive(Clone)]
pub(super) struct Field {
    pub(super) long: String,
    pub(super) short: String,
}

impl Field {
    pub(super) fn new(text: &str) -> Self {
        let text = clean(text);
        Self { short: text.clone(), long: text }
    }

    pub(super) fn or(mut self, short: &str) -> Self {
        self.short = clean(short);
        self
    }

    /// A path, in short its last part.
    pub(super) fn path(path: &str) -> Self {
        match path.trim_end_matches('/').rsplit_once('/') {
            Some((folder, name)) if !folder.is_empty() => {
                let short = format!("…/{name}");
                let shorter = short.chars().count() < path.chars().count();
                Self::new(path).or(if shorter { &short } else { path })
            }
            _ => Self::new(path),
        }
    }
}

pub(super) fn labelled(label: &str, text: &str) -> Field {
    Field::new(&format!("{label:<LABEL$}{text}"))
}

/// `block  1/16  reconstruct`, padded so that what follows stays in its column.
pub(super) fn positioned(label: &str, at: u64, of: u64, verb: &str) -> String {
    let digits = of.to_string().len().max(2);
    let position = format!("{label} {at:>digits$}/{of}");
    format!("{position:<LABEL$} {}{verb:<VERB$}", if position.len() > LABEL { " " } else { "  " })
}

/// Puts fields side by side: in full, then closer, then in short, then without the last ones.
pub(super) fn fit(head: &Field, fields: &[Field], width: usize) -> String {
    let join = |count: usize, short: bool, gap: usize| {
        let mut text = if short { head.short.clone() } else { head.long.clone() };
        for field in &fields[..count] {
            text.push_str(&" ".repeat(gap));
            text.push_str(if short { &field.short } else { &field.long });
        }
        text.truncate(text.trim_end().len());
        text
    };
    let all = fields.len();
    let in_full = [(all, false, 3), (all, false, 2)].into_iter();
    let in_short = (0..=all).rev().map(|count| (count, true, 2));
    in_full
        .chain(in_short)
        .map(|(count, short, gap)| join(count, short, gap))
        .find(|text| text.chars().count() <= width)
        .unwrap_or_else(|| {
            let kept: String = join(0, true, 2).chars().take(width.saturating_sub(1)).collect();
            kept + "…"
        })
}

/// A whole line of `run.log` in a width: sentences are wrapped, and fields are dropped from the right.
pub(super) fn refit(line: &str, width: usize) -> String {
    if line.chars().count() <= width {
        return line.to_owned();
    }
    if let Some((label, text)) = line.split_at_checked(LABEL)
        && matches!(label.trim_end(), "plan" | "note" | "warning")
    {
        return wrap(label.trim_end(), text, width);
    }
    // Where fields end: what is left keeps its columns.
    let ends = line.match_indices("  ").map(|(at, _)| line[..at].trim_end());
    let fits = ends.filter(|text| text.chars().count() <= width).last();
    fits.unwrap_or_else(|| line.split("  ").next().unwrap_or_default()).to_owned()
}

/// Breaks a text between words and indents what follows the first line.
pub(super) fn wrap(label: &str, text: &str, width: usize) -> String {
    let room = width.saturating_sub(LABEL).max(1);
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let word: Vec<char> = clean(word).chars().collect();
        // Only a word longer than a line comes in pieces.
        for piece in word.chunks(room) {
            let gap = usize::from(used > 0);
            if used + gap + piece.len() > room {
                lines.push(String::new());
                used = 0;
            }
            if let Some(line) = lines.last_mut() {
                if used > 0 {
                    line.push(' ');
                    used += 1;
                }
                line.extend(piece);
                used += piece.len();
            }
        }
    }
    format!("{label:<LABEL$}{}", lines.join(&format!("\n{}", " ".repeat(LABEL))))
}

/// Without control characters: a file's name must not move the cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_log_fits_another_width() {
        let line =
            "step  150/1500  distill      loss 1.277    lr 2.49e-3  grad 2.008    jsd 0.2216";
        assert_eq!(refit(line, 100), line);
        let narrow = refit(line, 60);
        assert!(narrow.starts_with("step  150/1500  distill      loss 1.277"), "{narrow}");
        assert!(narrow.chars().count() <= 60 && !narrow.contains("0.22"), "{narrow}");
        let note = format!("note      {}", "word ".repeat(30));
        let wrapped = refit(note.trim_end(), 60);
        assert!(wrapped.lines().all(|line| line.len() <= 60), "{wrapped}");
        assert_eq!(wrapped.matches("word").count(), 30);
    }
}

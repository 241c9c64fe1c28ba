//! Numbers for people.

/// Bytes for people, in powers of 1000: `0.61 GB`, `26 MB`, `512 B`.
pub fn size(bytes: u64) -> String {
    let (unit, scale) = match bytes {
        0..1_000 => return format!("{bytes} B"),
        1_000..100_000 => ("kB", 1e3),
        100_000..100_000_000 => ("MB", 1e6),
        100_000_000..1_000_000_000_000 => ("GB", 1e9),
        _ => ("TB", 1e12),
    };
    let amount = bytes as f64 / scale;
    let decimals = if amount < 0.995 { 2 } else { usize::from(amount < 9.95) };
    format!("{amount:.decimals$} {unit}")
}

/// A perplexity above this is no language model's whatever its vocabulary.
pub(super) const HOPELESS: f64 = 1e6;

/// A perplexity in words that nobody can misread: `51.2`, `1.2e5`, `over a million`, `not a number`.
pub fn perplexity(value: f64) -> String {
    if value.is_nan() {
        "not a number".to_owned()
    } else if value > HOPELESS {
        "over a million".to_owned()
    } else {
        significant(value, 4)
    }
}

/// Seconds for people: `4.2 s`, `61 s`, `3 min 20 s`, `18 min`, `2 h 10 min`, `3 d 4 h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "? s".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let minutes = (seconds / 60.0).round() as u64;
    let hours = (seconds / 3600.0).round() as u64;
    match whole {
        0..120 => format!("{whole} s"),
        120..600 => format!("{} min {} s", whole / 60, whole % 60),
        _ if minutes < 60 => format!("{minutes} min"),
        _ if minutes < 48 * 60 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{} d {} h", hours / 24, hours % 24),
    }
}

/// A number with so many significant digits; powers of ten if it is small or large.
pub(super) fn significant(value: f64, digits: usize) -> String {
    let magnitude = value.abs();
    if magnitude == 0.0 || !value.is_finite() {
        format!("{value}")
    } else if !(0.01..1e5).contains(&magnitude) {
        tiny(value)
    } else {
        let decimals = digits as f64 - 1.0 - magnitude.log10().floor();
        format!("{value:.*}", decimals.max(0.0) as usize)
    }
}

/// An error: `4.11e-4`.
pub(super) fn tiny(value: f64) -> String {
    format!("{value:.2e}")
}

/// `mem 0.10 GB`, `mem 3.20 GB`, `mem 45.1 GB`: one unit in one width, to compare line by line.
pub(super) fn memory(gib: f64) -> String {
    let gb = gib * 1.073_741_824;
    let decimals = if gb < 9.995 { 2 } else { usize::from(gb < 99.95) };
    format!("mem {gb:>4.decimals$} GB")
}

/// Seconds in at most six columns: `4.2 s`, `612 s`, `17 min`, `2.1 h`.
pub(super) fn brief(seconds: f64) -> String {
    if seconds < 9.95 {
        format!("{seconds:.1} s")
    } else if seconds < 999.5 {
        format!("{seconds:.0} s")
    } else if seconds < 5970.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{:.1} h", seconds / 3600.0)
    }
}

/// `128k`
pub(super) fn compact(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..10_000_000 => format!("{}k", count / 1000),
        _ => format!("{}M", count / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_for_people() {
        let seconds = [0.04, 9.96, 61.0, 119.6, 200.0, 1080.0, 3599.0, 7800.0, 273_600.0, f64::NAN];
        assert_eq!(
            seconds.map(duration),
            [
                "0.0 s",
                "10 s",
                "61 s",
                "2 min 0 s",
                "3 min 20 s",
                "18 min",
                "1 h 0 min",
                "2 h 10 min",
                "3 d 4 h",
                "? s"
            ]
        );
        let bytes = [512, 1_500, 26_000_000, 612_000_000, 5_100_000_000, 12_340_000_000];
        assert_eq!(bytes.map(size), ["512 B", "1.5 kB", "26 MB", "0.61 GB", "5.1 GB", "12 GB"]);
    }

    #[test]
    fn numbers_for_people() {
        let numbers = [0.0, 2.314_15, 13.9, 0.5, 0.000_02, 123_456.0, 1234.5, -2.5];
        assert_eq!(
            numbers.map(|n| significant(n, 4)),
            ["0", "2.314", "13.90", "0.5000", "2.00e-5", "1.23e5", "1234", "-2.500"]
        );
    }
}

//! Numbers with units, for people: three significant digits.

/// Three significant digits, without an exponent.
fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A value with the largest of `units` that leaves at least one before the point; each unit is
/// `step` times the one before it.
fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= step * 0.9995 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    format!("{} {}", digits(value), units[unit])
}

/// `12.3 ms`
pub(crate) fn seconds(value: f64) -> String {
    match value {
        v if v >= 120.0 => format!("{} min", digits(v / 60.0)),
        v if v >= 1.0 => format!("{} s", digits(v)),
        v => scaled(v * 1e9, 1e3, &["ns", "µs", "ms"]),
    }
}

/// `1.34 MB`: decimal, as disks and memory bandwidths are.
pub(crate) fn bytes(value: usize) -> String {
    match value {
        0..1000 => format!("{value} B"),
        _ => scaled(value as f64, 1e3, &["B", "kB", "MB", "GB", "TB"]),
    }
}

/// `1 tensor`, `2 tensors`
pub(crate) fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_the_fitting_unit() {
        for (value, text) in [
            (0.0, "0.00 ns"),
            (1.5e-7, "150 ns"),
            (9.999e-4, "1.00 ms"),
            (0.0123, "12.3 ms"),
            (0.009_996, "10.0 ms"),
            (0.099_96, "100 ms"),
            (1.0, "1.00 s"),
            (75.0, "75.0 s"),
            (300.0, "5.00 min"),
        ] {
            assert_eq!(seconds(value), text);
        }
        for (value, text) in [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB")]
        {
            assert_eq!(bytes(value), text);
        }
        assert_eq!(plural(1, "tensor"), "1 tensor");
        assert_eq!(plural(0, "tensor"), "0 tensors");
    }
}

//! What is chosen by a short text: layers, and sizes in bytes.

use std::ops::RangeInclusive;
use std::str::FromStr;

/// Which layers: `all`, `3`, `0-7`, or several of these, `3,5-9`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LayerChoice {
    /// Every MoE layer.
    All,
    /// Decoder layers, by their index in the model. A range means the MoE layers in it.
    Some(Vec<RangeInclusive<usize>>),
}

impl LayerChoice {
    /// Exactly one layer is named.
    pub(crate) fn is_single(&self) -> bool {
        matches!(self, Self::Some(ranges) if matches!(&ranges[..], [one] if one.start() == one.end()))
    }
}

impl FromStr for LayerChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unusable = || "layers are 'all', or numbers and ranges like 3 or 3,5-9".to_string();
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| unusable());
        let mut ranges = Vec::new();
        for part in text.split(',') {
            match part.trim().split_once('-') {
                None if part.trim() == "all" => return Ok(Self::All),
                None => ranges.push(number(part)?..=number(part)?),
                Some((first, last)) => ranges.push(number(first)?..=number(last)?),
            }
        }
        match ranges.iter().find(|range| range.is_empty()) {
            Some(range) => Err(format!("{}-{} is backwards", range.start(), range.end())),
            None => Ok(Self::Some(ranges)),
        }
    }
}

/// `5GB`, `500MB`, `1000000`: bytes, with decimal units.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => Some(1u64),
        "KB" => Some(1_000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        "TB" => Some(1_000_000_000_000),
        _ => None,
    };
    let bytes =
        digits.trim().parse::<u64>().ok().zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| "sizes are like 5GB, 500MB or 100000".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_choices() {
        assert_eq!("all".parse(), Ok(LayerChoice::All));
        assert_eq!("3,all".parse(), Ok(LayerChoice::All));
        assert_eq!("3,5".parse(), Ok(LayerChoice::Some(vec![3..=3, 5..=5])));
        assert_eq!("3, 5-9".parse(), Ok(LayerChoice::Some(vec![3..=3, 5..=9])));
        assert!("7".parse::<LayerChoice>().unwrap().is_single());
        assert!(!"7-8".parse::<LayerChoice>().unwrap().is_single());
        for bad in ["", "x", "-1", "3,", "1.5", "5-", "9-5", "1-2-3", "99999999999999999999999"] {
            assert!(bad.parse::<LayerChoice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_decimal_units() {
        for (text, bytes) in
            [("7", 7), ("7B", 7), ("7kB", 7e3 as u64), ("7 MB", 7e6 as u64), ("7gb", 7e9 as u64)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        assert_eq!(size("7TB"), Ok(7e12 as u64));
        for bad in ["", "0", "kB", "-1", "1.5GB", "7KiB", "99999999TB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}

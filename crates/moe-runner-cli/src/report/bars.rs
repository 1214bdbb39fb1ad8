//! Numbers as a row of small bars.

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Bars in a line.
const WIDTH: usize = 64;

/// One bar for each number, the largest a full block, zero a dot; lines of 64.
pub(crate) fn bars(values: &[usize]) -> Vec<String> {
    let most = values.iter().copied().max().unwrap_or(0).max(1);
    let bar = |value: &usize| match value {
        0 => '·',
        value => BARS[(value * BARS.len()).div_ceil(most) - 1],
    };
    values.chunks(WIDTH).map(|line| line.iter().map(bar).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::bars;

    #[test]
    fn the_largest_is_full_and_nothing_is_a_dot() {
        assert_eq!(bars(&[0, 1, 4, 8]), ["·▁▄█"]);
        assert_eq!(bars(&[0, 0]), ["··"]);
        assert_eq!(bars(&[1000, 1]), ["█▁"]);
        assert!(bars(&[]).is_empty());
        assert_eq!(
            bars(&[1; 130]).iter().map(|l| l.chars().count()).collect::<Vec<_>>(),
            [64, 64, 2]
        );
    }
}

//! Which rows of a batch each rank has.

use std::ops::Range;

use crate::comm::Sizes;

/// The rows of each rank, by flat rank, of a batch of `tokens`: equal runs for the DP ranks, the
/// last ones shorter; each cut the same way over the PCP ranks and, under sequence parallelism, over
/// the TP ranks (which otherwise all have the same rows).
pub fn deal_rows(tokens: usize, sizes: Sizes) -> Vec<Range<usize>> {
    (0..sizes.ranks())
        .map(|rank| {
            let rows = run(0..tokens, sizes.dp_rank(rank), sizes.dp);
            let rows = run(rows, sizes.pcp_rank(rank), sizes.pcp);
            match sizes.sp() {
                1 => rows,
                sp => run(rows, sizes.tp_rank(rank), sp),
            }
        })
        .collect()
}

/// The `index`-th of `count` runs of ⌈len / count⌉ rows; the last ones are shorter or empty.
fn run(rows: Range<usize>, index: usize, count: usize) -> Range<usize> {
    let each = rows.len().div_ceil(count);
    let start = rows.end.min(rows.start + index * each);
    start..rows.end.min(start + each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_runs_the_last_ones_shorter() {
        let sizes = Sizes { dp: 3, ..Sizes::default() };
        assert_eq!(deal_rows(7, sizes), [0..3, 3..6, 6..7]);
        assert_eq!(deal_rows(1, sizes), [0..1, 1..1, 1..1]);
        let sizes = Sizes { dp: 2, tp: 2, expert_parallel: true, ..Sizes::default() };
        assert_eq!(deal_rows(5, sizes), [0..3, 0..3, 3..5, 3..5]);
        let sizes = Sizes { sequence_parallel: true, ..sizes };
        assert_eq!(deal_rows(5, sizes), [0..2, 2..3, 3..4, 4..5]);
        let sizes = Sizes { pcp: 2, ..Sizes::default() };
        assert_eq!(deal_rows(33, sizes), [0..17, 17..33]);
    }
}

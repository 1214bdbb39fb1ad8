//! In what order a kernel reads the columns of a matrix, and where groups begin and end.

use std::ops::Range;

use super::layout::{BLOCK, Group, STEP};

/// The columns of a packed matrix, padded to whole steps.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Order {
    /// As they are, after `lead` places of padding.
    Straight { lead: usize, cols: usize, padded: usize },
    /// The column at each place; [`PADDING`] for none.
    Permuted(Vec<u32>),
}

/// No column.
pub(crate) const PADDING: u32 = u32::MAX;

impl Order {
    /// Places.
    pub(crate) fn padded(&self) -> usize {
        match self {
            Order::Straight { padded, .. } => *padded,
            Order::Permuted(places) => places.len(),
        }
    }

    /// The column at `place`; `None` for padding.
    pub(crate) fn column(&self, place: usize) -> Option<usize> {
        match self {
            Order::Straight { lead, cols, .. } => {
                (place >= *lead && place < lead + cols).then(|| place - lead)
            }
            Order::Permuted(from) => match from[place] {
                PADDING => None,
                column => Some(column as usize),
            },
        }
    }

    /// Writes the elements of `row` to their places, zeros to the others.
    pub(crate) fn apply<T: Copy + Default>(&self, row: &[T], places: &mut [T]) {
        self.place(row, places, |row, places| places.copy_from_slice(row), |element| element);
    }

    /// The same for elements that become others: `all` of a run of them, or `one`.
    pub(crate) fn place<S: Copy, T: Copy + Default>(
        &self,
        row: &[S],
        places: &mut [T],
        all: impl Fn(&[S], &mut [T]),
        one: impl Fn(S) -> T,
    ) {
        match self {
            Order::Straight { lead, cols, .. } => {
                let (head, rest) = places.split_at_mut(*lead);
                let (middle, tail) = rest.split_at_mut(*cols);
                head.fill(T::default());
                all(row, middle);
                tail.fill(T::default());
            }
            Order::Permuted(from) => {
                for (place, from) in places.iter_mut().zip(from) {
                    *place = match *from {
                        PADDING => T::default(),
                        column => one(row[column as usize]),
                    };
                }
            }
        }
    }
}

/// Order, blocks and groups of the columns of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Columns {
    pub(crate) order: Order,
    /// Steps of each block.
    pub(crate) blocks: Vec<u8>,
    /// For each group of each block, its number in the stored array; [`PADDING`] where all of it is.
    pub(crate) groups: Vec<u32>,
}

impl Columns {
    /// `cols` columns that all have one scale, or none.
    pub(crate) fn ungrouped(cols: usize) -> Columns {
        let mut columns = Columns::straight(0, cols);
        for start in (0..cols).step_by(BLOCK) {
            columns.push((cols - start).min(BLOCK).div_ceil(STEP));
            columns.groups.push(0);
        }
        columns
    }

    /// Columns `cols` of an array whose groups are runs of `size`, a multiple of a step.
    pub(crate) fn runs(cols: Range<usize>, size: usize) -> Columns {
        let mut columns = Columns::straight(cols.start % STEP, cols.len());
        let mut at = first_place(&cols);
        while at < cols.end {
            let start = at / size * size;
            let block = start + ((at - start) / BLOCK + 1) * BLOCK;
            let end = block.min(start + size).min(cols.end.next_multiple_of(STEP));
            columns.push((end - at) / STEP);
            columns.groups.push((at / size) as u32);
            at = end;
        }
        columns
    }

    /// Columns `cols` of an array in blocks of `len`, at most [`BLOCK`], with groups of sixteen or of a
    /// step.
    pub(crate) fn blocks(cols: Range<usize>, group: Group, len: usize) -> Columns {
        let size = if group == Group::Sixteen { 16 } else { STEP };
        let mut columns = Columns::straight(cols.start % STEP, cols.len());
        let mut at = first_place(&cols);
        while at < cols.end {
            let end = ((at / len + 1) * len).min(cols.end.next_multiple_of(STEP));
            columns.push((end - at) / STEP);
            // A group of padding alone must not bring its scale in: it may be NaN.
            let number = |at: usize| match at < cols.end && at + size > cols.start {
                true => (at / size) as u32,
                false => PADDING,
            };
            columns.groups.extend((at..end).step_by(size).map(number));
            at = end;
        }
        columns
    }

    /// Columns `cols` of an array where column `k` belongs to the group `group_of(k)`: group after
    /// group, each begins a step.
    pub(crate) fn gathered(cols: Range<usize>, group_of: impl Fn(usize) -> u32) -> Columns {
        let mut sorted: Vec<(u32, u32)> =
            cols.clone().map(|k| (group_of(k), (k - cols.start) as u32)).collect();
        sorted.sort_unstable();
        let mut places = Vec::with_capacity(sorted.len());
        let (mut blocks, mut groups) = (Vec::new(), Vec::new());
        for group in sorted.chunk_by(|a, b| a.0 == b.0) {
            for block in group.chunks(BLOCK) {
                blocks.push(block.len().div_ceil(STEP) as u8);
                groups.push(block[0].0);
                places.extend(block.iter().map(|(_, column)| *column));
                places.resize(places.len().next_multiple_of(STEP), PADDING);
            }
        }
        Columns { order: Order::Permuted(places), blocks, groups }
    }

    /// The places of each group.
    pub(crate) fn ranges(&self, group: Group) -> impl Iterator<Item = Range<usize>> {
        let mut start = 0;
        self.blocks.iter().flat_map(move |steps| {
            let steps = usize::from(*steps);
            let groups = group.count(steps);
            let len = steps * STEP / groups;
            let first = start;
            start += steps * STEP;
            (0..groups).map(move |group| first + group * len..first + (group + 1) * len)
        })
    }

    fn straight(lead: usize, cols: usize) -> Columns {
        let padded = if cols == 0 { 0 } else { (lead + cols).next_multiple_of(STEP) };
        let order = Order::Straight { lead: if cols == 0 { 0 } else { lead }, cols, padded };
        Columns { order, blocks: Vec::new(), groups: Vec::new() }
    }

    fn push(&mut self, steps: usize) {
        self.blocks.push(steps as u8);
    }
}

/// The column at the first place; the end where there are no columns.
fn first_place(cols: &Range<usize>) -> usize {
    if cols.is_empty() { cols.end } else { cols.start - cols.start % STEP }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_begin_at_a_step() {
        let columns = Columns::runs(40..200, 128);
        assert_eq!(columns.order, Order::Straight { lead: 8, cols: 160, padded: 192 });
        assert_eq!((columns.blocks, columns.groups), (vec![3, 3], vec![0, 1]));
        let columns = Columns::runs(0..700, 384);
        assert_eq!((columns.blocks, columns.groups), (vec![8, 4, 8, 2], vec![0, 0, 1, 1]));
        let columns = Columns::blocks(32..48, Group::Sixteen, BLOCK);
        assert_eq!((columns.blocks, columns.groups), (vec![1], vec![2, PADDING]));
        let columns = Columns::blocks(224..300, Group::ThirtyTwo, BLOCK);
        assert_eq!((columns.blocks, columns.groups), (vec![1, 2], vec![7, 8, 9]));
        let columns = Columns::blocks(221..250, Group::Sixteen, BLOCK);
        assert_eq!((columns.blocks, columns.groups), (vec![2], vec![PADDING, 13, 14, 15]));
        assert_eq!(Columns::ungrouped(300).blocks, vec![8, 2]);
        for empty in [Columns::ungrouped(0), Columns::runs(40..40, 32)] {
            assert_eq!((empty.order.padded(), empty.blocks.len()), (0, 0));
        }
    }

    #[test]
    fn gathered_groups_are_padded() {
        let columns = Columns::gathered(10..15, |k| (k % 2) as u32);
        let Order::Permuted(places) = &columns.order else { panic!("permuted") };
        assert_eq!(places[..4], [0, 2, 4, PADDING]);
        assert_eq!(places[32..35], [1, 3, PADDING]);
        assert_eq!((places.len(), &columns.groups[..]), (64, &[0, 1][..]));
        let mut row = [7.0; 64];
        columns.order.apply(&[1.0, 2.0, 3.0, 4.0, 5.0], &mut row);
        assert_eq!((row[1], row[3], row[32], row[40]), (3.0, 0.0, 2.0, 0.0));
    }
}

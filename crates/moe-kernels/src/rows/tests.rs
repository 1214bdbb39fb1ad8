//! Views refuse what is not there; tiles are made once each.

use super::*;
use crate::region::for_each_tile;

#[test]
fn views_refuse_what_is_not_there() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let refused = |f: &mut dyn FnMut()| catch_unwind(AssertUnwindSafe(f)).is_err();
    let x = [0.0; 8];
    assert!(refused(&mut || _ = Rows::new(&x, 3, 3, 3)));
    assert!(refused(&mut || _ = Rows::new(&x, usize::MAX, 1, 2)));
    assert!(refused(&mut || _ = RowsMut::new(&mut x.clone(), 2, 4, 3)));
    assert!(refused(&mut || _ = Rows::new(&x, 2, 4, 4).slice(1..3)));
    let out = &mut [0.0; 8];
    let mut out = RowsMut::new(out, 2, 4, 4);
    assert!(refused(&mut || _ = out.window(0..2, 3..5)));
    for blocks in [[0..2, 1..2], [1..2, 0..1], [0..1, 2..3]] {
        assert!(refused(&mut || _ = out.tiles(&blocks, 4)));
    }
    assert_eq!(out.window(2..2, 4..4).rows(), 0);
}

#[test]
fn tiles_cover_their_blocks_once_even_with_a_pool_that_repeats_items() {
    struct Twice;
    impl crate::pool::ThreadPool for Twice {
        fn threads(&self) -> usize {
            2
        }

        fn run(&self, items: usize, work: crate::pool::Work<'_>) {
            for _ in 0..2 {
                (0..items).for_each(|item| work(crate::pool::Worker::new(0), item));
            }
        }
    }
    let mut data = vec![0.0; 6 * 5];
    let blocks = [0..2, 3..3, 4..5];
    let mut rows = RowsMut::new(&mut data, 6, 5, 5);
    for_each_tile(&Twice, &mut [], &rows.tiles(&blocks, 2), |_, tile| {
        let Tile { block, cols, mut out, .. } = tile;
        assert_eq!((out.rows(), out.cols()), (blocks[block].len(), cols.len()));
        for i in 0..out.rows() {
            for (value, col) in out.row_mut(i).iter_mut().zip(cols.clone()) {
                *value += (10 * block + col + 1) as f32;
            }
        }
    });
    let row = |block: usize| (0..5).map(move |col| (10 * block + col + 1) as f32);
    let want: Vec<f32> =
        row(0).chain(row(0)).chain([0.0; 10]).chain(row(2)).chain([0.0; 5]).collect();
    assert_eq!(data, want);
}

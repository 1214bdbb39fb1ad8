//! Packed weights that were taken apart and put together again.

use super::*;
use crate::pack::{Packed, Parts, VERSION};
use crate::stored::Bytes;

fn packed(rows: OperandKind) -> Vec<(String, View, Packed)> {
    let all = cases(&mut Numbers(5), 70, 260).into_iter().chain(cases(&mut Numbers(6), 16, 40));
    all.filter_map(|(name, view)| {
        let gemm = super::super::gemm(&view, rows, Cpu::detect().features())?;
        let packed = pack(&view, gemm).unwrap();
        Some((name, view, packed))
    })
    .collect()
}

fn copy(bytes: &[u8]) -> Bytes {
    bytes.to_vec().into()
}

#[test]
fn what_was_taken_apart_multiplies_as_before() {
    for kind in [OperandKind::F32, OperandKind::Bf16] {
        for (name, view, w) in packed(kind) {
            let again = Packed::from_parts(&w.parts(), copy(w.as_bytes())).unwrap();
            assert_eq!(again.parts(), w.parts(), "{name}");
            let x = Numbers(3).normal(5 * view.cols());
            let run = |w: &Packed| {
                let mut memory = vec![0; w.gemm().operand_bytes(w, 5)];
                let rows = Rows::new(&x, 5, view.cols(), view.cols());
                let x = w.gemm().operand(w, rows, &mut memory);
                let mut out = vec![0.0; 5 * view.rows()];
                let mut rows = RowsMut::new(&mut out, 5, view.rows(), view.rows());
                w.gemm().run(w, x, 0..5, 0..w.units(), &mut rows);
                bits(&out)
            };
            assert_eq!(run(&again), run(&w), "{name}");
        }
    }
}

/// What is read where nothing is must not be put together: any number in the parts that is wrong.
#[test]
fn what_does_not_belong_together_is_refused() {
    for (name, _, w) in packed(OperandKind::F32) {
        let parts = w.parts();
        let refused = |parts: &Parts, bytes: Bytes, what: &str| {
            assert!(Packed::from_parts(parts, bytes).is_err(), "{name}: {what}");
        };
        let bytes = w.as_bytes();
        refused(&parts, copy(&bytes[1..]), "a byte less");
        refused(&parts, copy(&[bytes, &[0]].concat()), "a byte more");
        for (what, other) in parts.wrong() {
            refused(&other, copy(bytes), what);
        }
    }
}

/// Bytes of packed weights that change without the version are read as what they are not.
#[test]
fn the_version_counts_layouts() {
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    for (_, view) in
        cases(&mut Numbers(5), 70, 260).into_iter().chain(cases(&mut Numbers(6), 16, 40))
    {
        let gemm = super::super::gemm(&view, OperandKind::F32, Features::NONE).unwrap();
        for byte in pack(&view, gemm).unwrap().as_bytes() {
            digest = (digest ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    let known = [(1, 0x03d8_2a86_e209_c551)];
    let now = (VERSION, digest);
    assert!(known.contains(&now), "packed bytes have changed: count up VERSION, and note {now:x?}");
}

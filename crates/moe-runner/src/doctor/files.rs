//! Files whose tail is zeros: a download that never ended, on a disk that was full or of a program
//! that made the file as large as it was to be.

use super::finding::{Finding, FindingKind, Severity};
use crate::checkpoint::{Checkpoint, StoredDtype, TailTensor};
use crate::weights::quant::names;

/// Fewer zeros than this are no evidence.
const LEAST: usize = 256;

/// Bytes of the longest number.
const NUMBER: usize = 8;

/// Looks at the ends of all files, as far as they are zeros.
pub fn files(checkpoint: &Checkpoint) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in checkpoint.tails() {
        // from the end: what may well be zeros says nothing
        let tensors = &file.tensors;
        let said = |tensor: &TailTensor| !(tensor.is_zero() && may_be_zeros(tensor));
        let Some(first) = tensors.iter().position(said) else { continue };
        let (last, tensors) = (&tensors[first], &tensors[first..]);
        if last.zeros < LEAST.min(last.bytes) || may_be_zeros(last) {
            continue;
        }
        let names: Vec<String> = tensors
            .iter()
            .take_while(|tensor| tensor.zeros > 0)
            .map(|tensor| tensor.name.to_owned())
            .collect();
        // some rows of zeros may be padding, of a vocabulary or of a width; a number before them may
        // end in zeros, too
        let row = (last.bytes / last.shape[0].max(1)).max(1);
        let padding = last.zeros <= last.bytes / 2 && last.zeros % row <= NUMBER;
        findings.push(Finding {
            kind: FindingKind::ZeroTail,
            severity: if padding { Severity::Warning } else { Severity::Error },
            layer: None,
            experts: Vec::new(),
            file: file.path.to_owned(),
            detail: match last.is_zero() {
                true => format!("is all zeros, as the last {} bytes of the file are", file.zeros),
                false => format!("ends in {} zeros, and the file with it", last.zeros),
            },
            names,
        });
    }
    findings
}

/// Whether a tensor of zeros is nothing out of the ordinary: a bias, zero points, groups of columns.
fn may_be_zeros(tensor: &TailTensor<'_>) -> bool {
    let vector = tensor.shape.iter().filter(|size| **size > 1).count() < 2;
    let zeros = [names::ZEROS, names::QZEROS, names::GROUPS, names::G_IDX, names::BIAS].concat();
    let named = zeros.iter().any(|ending| tensor.name.ends_with(ending));
    let unknown = matches!(tensor.dtype, StoredDtype::Unknown(_));
    tensor.bytes == 0 || vector || named || unknown
}

//! GGUF's scales of whole matrices: `<module>.scale`, one for each expert, beside the module's
//! weights (NVFP4 files have them).

use moe_kernels::numerics::DecodeScale;
use moe_kernels::numerics::ggml::BlockType;

use super::module::{Problem, Result, misfit};
use crate::checkpoint::Tensor;
use crate::checkpoint::architecture::Projection;
use crate::spec::Granularity;
use crate::weights::load::accounting::Loader;
use crate::weights::{
    Blocks, Codes, Element, Global, Matrix, Packing, ScaleType, Scales, Stored, Zeros,
};

/// `matrix` times the scale that stands beside it, if one does. NVFP4 becomes codes with a scale for
/// the tensor, which is what it is everywhere else; other types are decoded.
pub(crate) fn times_its_scale(
    loader: &mut Loader,
    projection: &Projection,
    matrix: Matrix,
) -> Result<Matrix> {
    let name = format!("{}.scale", projection.module);
    if loader.is_reserved(&name) {
        return Ok(matrix);
    }
    let Some(tensor) = loader.claim(&name)? else { return Ok(matrix) };
    let values = tensor.to_f32()?;
    let index = projection.part.stack.map_or(0, |stack| stack.index);
    let count = projection.part.stack.map_or(1, |stack| stack.count);
    if values.len() != count && values.len() != 1 {
        return Err(tensor.wrong_shape(&[count]).into());
    }
    let scale = values[index.min(values.len() - 1)];
    if tensor.blank {
        return Ok(matrix);
    }
    if !scale.is_finite() {
        return Err(tensor.error(format!("is {scale} for expert {index}")).into());
    }
    let scaled = match matrix.view().stored() {
        _ if scale == 1.0 => return Ok(matrix),
        Stored::Blocks(blocks) if blocks.block() == BlockType::Nvfp4 && scale > 0.0 => {
            Matrix::new(nvfp4(&tensor, &matrix, blocks, scale)?)
        }
        _ => {
            let [rows, cols] = [matrix.rows(), matrix.cols()];
            let mut values = vec![0.0; rows * cols];
            for (row, out) in values.chunks_mut(cols.max(1)).enumerate() {
                matrix.decode_row(row, out);
                out.iter_mut().for_each(|value| *value *= scale);
            }
            Matrix::from_f32(&values, [rows, cols])?
        }
    };
    Ok(scaled.with_input(matrix.input))
}

/// The window that `matrix` is of `blocks`, as rows of codes and rows of scales.
fn nvfp4(tensor: &Tensor, matrix: &Matrix, blocks: &Blocks, scale: f32) -> Result<Codes, Problem> {
    let [rows, cols] = [matrix.rows(), matrix.cols()];
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let row = blocks.row(matrix.view().stored_row(row));
        for block in row.chunks_exact(BlockType::Nvfp4.block_bytes()) {
            let (four, halves) = block.split_at(4);
            // unsigned; the code that would be no number is zero, as in ggml
            scales.extend(four.iter().map(|s| if *s == 0x7f { 0 } else { s & 0x7f }));
            for eight in halves.chunks_exact(8) {
                // low nibbles come first, then high ones: here each byte has two neighbours
                let nibble = |i: usize| eight[i % 8] >> (i / 8 * 4) & 15;
                codes.extend((0..8).map(|i| nibble(2 * i) | nibble(2 * i + 1) << 4));
            }
        }
    }
    let scales =
        Scales::new(scales.into(), ScaleType::E4m3, Granularity::Group, [1, 16], [rows, cols]);
    let scales = scales.map_err(misfit(tensor))?;
    let global = Some(Global::Multiply(DecodeScale(scale)));
    let packing = (Element::E2m1, Packing::Rows);
    Codes::new(packing, codes.into(), [rows, cols], scales, Zeros::None, global)
        .map_err(misfit(tensor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;
    use crate::random::Random;

    /// Codes and scales are those of the blocks, in every row of a window: the values are the blocks' own, as
    /// their decoder has them, times the scale. All of it is exact in f32.
    #[test]
    fn blocks_of_nvfp4_become_codes() {
        const SCALE: f32 = 0.375;
        let (rows, cols) = (6, 192);
        let row_bytes = BlockType::Nvfp4.row_bytes(cols).unwrap();
        let random = &mut Random::new(5);
        let bytes: Vec<u8> = (0..rows * row_bytes).map(|_| (random.unit() * 256.0) as u8).collect();
        let blocks = Blocks::new(BlockType::Nvfp4, bytes.into(), [rows, cols]).unwrap();
        let all = Matrix::new(blocks.clone());
        let window = all.rows_of(1, 2, 3).unwrap();
        let tensor = Tensor {
            name: "m.scale".into(),
            file: "f".into(),
            dtype: Dtype::F32,
            shape: vec![1],
            bytes: SCALE.to_le_bytes().to_vec().into(),
            blank: false,
        };
        for matrix in [all, window] {
            let codes = nvfp4(&tensor, &matrix, &blocks, SCALE).unwrap_or_else(|_| panic!("fits"));
            let codes = Matrix::new(codes);
            let (mut got, mut want) = (vec![0.0; cols], vec![0.0; cols]);
            for row in 0..matrix.rows() {
                codes.decode_row(row, &mut got);
                matrix.decode_row(row, &mut want);
                want.iter_mut().for_each(|value| *value *= SCALE);
                assert_eq!(got, want, "row {row}");
            }
        }
    }
}

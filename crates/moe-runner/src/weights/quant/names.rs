//! Endings of tensor names after the module's, by role. The first one that is there is read, and
//! the first one is what a writer of the compressed-tensors layout writes.
//!
//! | scheme | codes | scales | tensor's scale | other |
//! |---|---|---|---|---|
//! | FP8, INT8 | `.weight` F8_E4M3 or I8 `[N, K]` | `.weight_scale` (`.weight_scale_inv`, `.scale`, …) `[]`, `[N, 1]`, `[⌈N/bn⌉, ⌈K/bk⌉]` | | `.input_scale` `[]` |
//! | INT4, INT8 packed | `.weight_packed` I32 `[N, K·b/32]` | `.weight_scale` `[N, K/g]` | | `.weight_shape` `[2]`, `.weight_zero_point` I32 `[N·b/32, K/g]`, `.weight_g_idx` I32 `[K]` |
//! | NVFP4 | `.weight_packed` U8 `[N, K/2]` | `.weight_scale` F8_E4M3 `[N, K/16]` | `.weight_global_scale` `[1]`, divides | `.input_global_scale` `[1]` |
//! | NVFP4, ModelOpt | `.weight` | `.weight_scale` | `.weight_scale_2` `[]`, multiplies | `.input_scale` `[]` |
//! | MXFP4 | `.weight_packed` U8 `[N, K/2]` | `.weight_scale` U8 `[N, K/32]` | | |
//! | MXFP6 | `.weight` U8 `[N, 3K/4]` | `.weight_scale` U8 `[N, K/32]` | | |
//! | MXFP8 | `.weight` F8_E4M3 `[N, K]` | `.weight_scale` U8 `[N, K/32]` | | |
//! | MXFP4, gpt-oss | `_blocks` U8 `[E, N, K/32, 16]` | `_scales` U8 `[E, N, K/32]` | | |
//! | GPTQ | `.qweight` I32 `[K·b/32, N]` | `.scales` `[K/g, N]` | | `.qzeros` I32 `[K/g, N·b/32]`, `.g_idx` I32 `[K]` |
//! | AWQ | `.qweight` I32 `[K, N/8]` | `.scales` `[K/g, N]` | | `.qzeros` I32 `[K/g, N/8]` |
//! | Quark INT4 | `.weight` I32 `[K, N/8]` | `.weight_scale` `[K/g, N]` | | `.weight_zero_point` I32 `[K/g, N/8]` |
//! | MLX | `.weight` U32 `[N, K·b/32]` | `.scales` `[N, K/g]` | `.global_scale` `[]` of NVFP4 | `.biases` `[N, K/g]` of integers |
//! | Quark W4A8 | `.weight` I32 `[N, K/8]` | `.weight_scale_2` F32 `[N]` | `.weight_scale` F32 `[]` | `.input_scale` `[]` |
//!
//! Stacks of experts have one more dimension in front, and `_` in place of the dot or of `.weight_`, or
//! no ending.

/// One code for each weight.
pub(crate) const CODES: &[&str] = &[".weight", ""];
/// Packed integers.
pub(crate) const PACKED: &[&str] = &[".weight_packed", "_weight_packed", "_packed"];
/// FP4 and FP6, packed.
pub(crate) const PACKED_FLOATS: &[&str] =
    &[".weight_packed", ".weight", "_blocks", "_weight_packed", "_packed", ""];
/// Scales of channels, groups and blocks; of tensors, where there are no others.
pub(crate) const SCALES: &[&str] = &[
    ".weight_scale",
    ".weight_scale_inv",
    ".scales",
    "_scales",
    "_scale_inv",
    "_weight_scale",
    "_weight_scale_inv",
    "_scale",
    ".scale",
];
/// A tensor's scale that divides.
pub(crate) const ENCODE_SCALE: &[&str] =
    &[".weight_global_scale", "_weight_global_scale", "_global_scale"];
/// A tensor's scale that multiplies.
pub(crate) const DECODE_SCALE: &[&str] = &[".weight_scale_2", "_weight_scale_2", "_scale_2"];
/// Zero points.
pub(crate) const ZEROS: &[&str] = &[".weight_zero_point", "_weight_zero_point", "_zero_point"];
/// Groups of columns.
pub(crate) const GROUPS: &[&str] = &[".weight_g_idx", "_weight_g_idx", "_g_idx"];
/// The true shape of packed weights.
pub(crate) const SHAPE: &[&str] = &[".weight_shape", "_weight_shape", "_shape"];
/// Codes of GPTQ and AWQ.
pub(crate) const QWEIGHT: &[&str] = &[".qweight", "_qweight"];
/// Their scales.
pub(crate) const QSCALES: &[&str] = &[".scales", "_scales"];
/// Their zero points.
pub(crate) const QZEROS: &[&str] = &[".qzeros", "_qzeros"];
/// What MLX adds to the weights of a group.
pub(crate) const MINIMA: &[&str] = &[".biases", "_biases"];
/// The largest weight that MLX's NVFP4 can be.
pub(crate) const MAX_WEIGHT: &[&str] = &[".global_scale"];
/// Groups of columns of GPTQ.
pub(crate) const G_IDX: &[&str] = &[".g_idx", "_g_idx"];
/// A stored scale of activations that takes codes back to values.
pub(crate) const INPUT_SCALE: &[&str] = &[".input_scale", "_input_scale", ".act_scale"];
/// The same, on the second of two levels (Quark's NVFP4).
pub(crate) const INPUT_SCALE_2: &[&str] = &[".input_scale_2", "_input_scale_2"];
/// A stored scale of activations that multiplies before they are quantised.
pub(crate) const INPUT_ENCODE_SCALE: &[&str] = &[".input_global_scale", "_input_global_scale"];
/// Zero points of activations: those of symmetric schemes are written, and mean nothing.
pub(crate) const INPUT_ZEROS: &[&str] = &[".input_zero_point", "_input_zero_point"];
/// The bias, which some writers add to every module.
pub(crate) const BIAS: &[&str] = &[".bias"];

/// Every ending.
pub(crate) const ALL: &[&[&str]] = &[
    CODES,
    PACKED,
    PACKED_FLOATS,
    SCALES,
    ENCODE_SCALE,
    DECODE_SCALE,
    ZEROS,
    GROUPS,
    SHAPE,
    QWEIGHT,
    QSCALES,
    QZEROS,
    MINIMA,
    MAX_WEIGHT,
    G_IDX,
    INPUT_SCALE,
    INPUT_SCALE_2,
    INPUT_ENCODE_SCALE,
    INPUT_ZEROS,
];

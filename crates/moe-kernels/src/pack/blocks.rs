//! How the block types of GGUF are packed.

use super::layout::{Codes, Group, Layout, Number, Offset};
use crate::numerics::ggml::{BlockType, Form, Points};

/// How a type is packed, and the numbers that its codes stand for; for integers the number that is
/// taken off.
pub(super) fn layout(block: BlockType) -> (Layout, Vec<f32>) {
    let Form { bits, points, sub, minimum } = block.form();
    let (codes, numbers) = match points {
        Points::Signed => (Codes::Int8, Vec::new()),
        Points::Table(table) => (Codes::Table4, table.to_vec()),
        Points::Less(middle) => {
            let middle = f32::from(middle);
            let table = (0..1 << bits).map(|code| code as f32 - middle).collect();
            match bits {
                2 => (Codes::Table2, table),
                3 => (Codes::Table3, table),
                4 => (Codes::Table4, table),
                5 => (Codes::Int5, vec![middle]),
                _ => (Codes::Int6, vec![middle]),
            }
        }
    };
    let plain = Layout::plain(codes);
    let layout = match block {
        BlockType::Mxfp4 => Layout { scale: Some(Number::E8m0), ..plain },
        BlockType::Nvfp4 => Layout { group: Group::Sixteen, scale: Some(Number::E4m3), ..plain },
        _ if sub.is_none() => Layout {
            scale: Some(Number::F16),
            offset: if minimum { Offset::Minimum(Number::F16) } else { Offset::None },
            ..plain
        },
        _ => {
            // scales and minima of four bits share a byte
            let (scale, least) = match block {
                BlockType::Q2K => (Number::Low4, Number::High4),
                _ => (Number::Int8, Number::Int8),
            };
            Layout {
                group: if sub == Some(16) { Group::Sixteen } else { Group::ThirtyTwo },
                scale: Some(scale),
                outer_scale: true,
                offset: if minimum { Offset::Minimum(least) } else { Offset::None },
                outer_minimum: minimum,
                ..plain
            }
        }
    };
    (layout, numbers)
}

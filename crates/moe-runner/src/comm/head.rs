//! What a rank says about the collective it enters, and whether two ranks mean the same one.

use std::fmt;

use super::Dtype;

/// Where in the forward pass a collective stands. Failures name it.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// The layer's name in the checkpoint, or what else the call belongs to.
    pub layer: &'a str,
    /// The step within the layer.
    pub step: Step,
}

impl<'a> At<'a> {
    /// `step` of `layer`.
    pub fn new(layer: &'a str, step: Step) -> Self {
        Self { layer, step }
    }
}

macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// Every value, in order of declaration.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in messages.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

named! {
    /// The step of a layer that a collective belongs to.
    Step {
        /// Before the first forward pass: groups, sizes, weights.
        Setup = "setup",
        /// Rows go to the ranks that own their experts, or to all ranks.
        Dispatch = "dispatch",
        /// Ranks with slices of a row agree on its largest magnitude.
        RowScales = "row scales",
        /// Expert outputs come back to the rows' ranks.
        Combine = "combine",
        /// The routed output is summed over ranks.
        ReduceRouted = "reduce routed",
        /// The shared experts' output is summed over ranks.
        ReduceShared = "reduce shared",
        /// The layer's output is summed over ranks.
        ReduceOutput = "reduce output",
        /// Expert loads are summed, to balance replicas.
        Balance = "balance",
        /// Expert weights move between ranks.
        MoveWeights = "move weights",
        /// After the last forward pass.
        Finish = "finish",
    }
}

named! {
    /// The kinds of collective.
    Kind {
        /// No elements; returns when all ranks are in it.
        Barrier = "barrier",
        /// One rank's elements go to all.
        Broadcast = "broadcast",
        /// Equal contributions of all ranks go to all.
        AllGather = "all-gather",
        /// Contributions of any length go to all.
        AllGatherV = "all-gather-v",
        /// Sums over ranks; each rank gets an equal part.
        ReduceScatter = "reduce-scatter",
        /// Sums over ranks; each rank gets a part of its own length.
        ReduceScatterV = "reduce-scatter-v",
        /// Sums over ranks; all ranks get all of them.
        AllReduce = "all-reduce",
        /// Each rank sends each rank a part of any length.
        AllToAllV = "all-to-all-v",
        /// Subgroups are formed.
        Split = "split",
        /// A process leaves: it will take part in nothing more.
        Leave = "leave",
    }
}

impl Kind {
    /// Every rank must bring the same number of elements.
    fn equal_totals(self) -> bool {
        !matches!(self, Self::AllGatherV | Self::AllToAllV)
    }
}

/// A layer's name and a step, without a pointer: it is written on every collective and travels.
/// Of names longer than 54 bytes the end is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Place {
    step: Step,
    len: u8,
    layer: [u8; Place::ROOM],
}

impl Place {
    const ROOM: usize = 54;

    fn layer(&self) -> &str {
        std::str::from_utf8(&self.layer[..self.len as usize]).unwrap_or("?")
    }
}

impl From<At<'_>> for Place {
    fn from(at: At<'_>) -> Self {
        let mut name = at.layer;
        while name.len() > Self::ROOM {
            let mut chars = name.chars();
            chars.next();
            name = chars.as_str();
        }
        let mut layer = [0; Self::ROOM];
        layer[..name.len()].copy_from_slice(name.as_bytes());
        Self { step: at.step, len: name.len() as u8, layer }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer '{}', step '{}'", self.layer(), self.step)
    }
}

/// What a rank says when it enters a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Which collective.
    pub kind: Kind,
    /// The elements' dtype.
    pub dtype: Dtype,
    /// The rank that sends, of a broadcast; 0 otherwise.
    pub root: u32,
    /// Elements that this rank brings; of a broadcast, elements that it sends or expects.
    pub total: u64,
    /// Where in the model.
    pub place: Place,
}

impl Head {
    /// Bytes of the wire form.
    pub(crate) const WIRE: usize = 72;

    /// What is wrong if `self` and `other` are two ranks' heads of one collective.
    pub(crate) fn conflict(&self, other: &Head) -> Option<String> {
        if (self.kind, self.place) != (other.kind, other.place) {
            return Some("the ranks are in different collectives".to_owned());
        }
        if self.dtype != other.dtype {
            return Some(format!("the dtypes differ: {} and {}", self.dtype, other.dtype));
        }
        if self.root != other.root {
            return Some(format!("the root ranks differ: {} and {}", self.root, other.root));
        }
        if self.kind.equal_totals() && self.total != other.total {
            let (a, b) = (self.total, other.total);
            return Some(format!("the numbers of elements differ: {a} and {b}"));
        }
        None
    }

    /// Elements of a part of what a rank with this head brings, as it says: no more than all.
    pub(super) fn part_size(&self, count: u64) -> Result<usize, String> {
        match usize::try_from(count) {
            Ok(size) if count <= self.total => Ok(size),
            _ => Err(format!("a part of {count} of {} elements", self.total)),
        }
    }

    /// The wire form, little-endian.
    pub(crate) fn encode(&self) -> [u8; Self::WIRE] {
        let mut wire = [0; Self::WIRE];
        wire[0] = self.kind as u8;
        wire[1] = self.dtype as u8;
        wire[2] = self.place.step as u8;
        wire[3] = self.place.len;
        wire[4..8].copy_from_slice(&self.root.to_le_bytes());
        wire[8..16].copy_from_slice(&self.total.to_le_bytes());
        wire[16..16 + Place::ROOM].copy_from_slice(&self.place.layer);
        wire
    }

    /// The inverse of [`encode`](Head::encode); `None` for bytes that no `encode` wrote.
    pub(crate) fn decode(wire: &[u8; Self::WIRE]) -> Option<Self> {
        let mut layer = [0; Place::ROOM];
        layer.copy_from_slice(&wire[16..16 + Place::ROOM]);
        let place = Place { step: *Step::ALL.get(wire[2] as usize)?, len: wire[3], layer };
        if usize::from(place.len) > Place::ROOM {
            return None;
        }
        Some(Self {
            kind: *Kind::ALL.get(wire[0] as usize)?,
            dtype: *Dtype::ALL.get(wire[1] as usize)?,
            root: u32::from_le_bytes(wire[4..8].try_into().ok()?),
            total: u64::from_le_bytes(wire[8..16].try_into().ok()?),
            place,
        })
    }
}

/// Elements of all parts. They come from other processes: that they can be added up and held is
/// theirs to say and ours to check.
pub(super) fn total_size(counts: &[usize], width: usize) -> Result<usize, String> {
    let total = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count));
    let bytes = total.and_then(|total| total.checked_mul(width));
    match (total, bytes) {
        (Some(total), Some(bytes)) if bytes <= isize::MAX as usize => Ok(total),
        _ => Err(format!("the ranks send parts of {counts:?} elements, more than memory can hold")),
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.kind, self.place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(layer: &str) -> Head {
        Head {
            kind: Kind::AllToAllV,
            dtype: Dtype::Bf16,
            root: 3,
            total: 1 << 40,
            place: At::new(layer, Step::Combine).into(),
        }
    }

    #[test]
    fn wire_form_round_trips() {
        for layer in ["", "model.layers.3.mlp", &"é".repeat(40)] {
            let head = head(layer);
            assert_eq!(Head::decode(&head.encode()), Some(head));
        }
        assert_eq!(Head::decode(&[0xff; Head::WIRE]), None);
    }

    #[test]
    fn a_long_name_keeps_its_end() {
        let name = format!("{}.layers.17.mlp", "é".repeat(40));
        let text = head(&name).to_string();
        assert!(text.contains("éé.layers.17.mlp', step 'combine'"), "{text}");
    }

    #[test]
    fn conflicts_are_named() {
        let a = head("x");
        assert_eq!(a.conflict(&Head { total: 1, ..a }), None, "all-to-all-v takes any length");
        assert!(a.conflict(&Head { kind: Kind::Barrier, ..a }).is_some());
        assert!(a.conflict(&head("y")).is_some());
        assert!(a.conflict(&Head { dtype: Dtype::F16, ..a }).unwrap().contains("bf16 and f16"));
        assert!(a.conflict(&Head { root: 0, ..a }).unwrap().contains("3 and 0"));
        let a = Head { kind: Kind::AllReduce, ..a };
        assert!(a.conflict(&Head { total: 1, ..a }).unwrap().contains("numbers of elements"));
    }

    #[test]
    fn sizes_from_other_processes_are_checked() {
        assert_eq!(total_size(&[1, 0, 5], 4), Ok(6));
        for counts in [&[usize::MAX, 2][..], &[usize::MAX / 2 + 1; 2], &[1 << 62, 0]] {
            let reason = total_size(counts, 4).unwrap_err();
            assert!(reason.contains("more than memory can hold"), "{reason}");
        }
        let head = Head { total: 7, ..head("x") };
        assert_eq!(head.part_size(7), Ok(7));
        assert!(head.part_size(8).is_err() && head.part_size(u64::MAX).is_err());
    }
}

//! Expert ids of three kinds that must never be mixed up.
//!
//! A logical id is what the router chooses; a physical id is one copy of that expert (a popular
//! expert may have several); a local id is the row of that copy in one rank's weights. Placement
//! turns the first into the second, and a rank's share of the experts the second into the third.

/// An expert as the model knows it: 0..E, and E.. for identity and skip experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct LogicalId(pub u32);

/// One copy of an expert, numbered over all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PhysicalId(pub u32);

/// A row of one rank's stacked expert weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct LocalId(pub u32);

macro_rules! index {
    ($($id:ident),*) => {$(
        impl $id {
            /// The id as an index.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Display for $id {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
index!(LogicalId, PhysicalId, LocalId);

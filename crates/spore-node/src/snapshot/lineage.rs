//! Which snapshot continues which, and what that keeps: pure.
//!
//! Used by the store for removal, collection and `info`. Knows ids only; who owns what and what is
//! on the disk is the store's.

use std::collections::{BTreeMap, BTreeSet};

use spore_wire::id::SnapshotId;

/// The most snapshots that one may continue. A fork of a deeper one reads them all, once.
pub const DEPTH_MAX: usize = 32;

/// Every snapshot with the one that it continues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    parents: BTreeMap<SnapshotId, Option<SnapshotId>>,
}

impl FromIterator<(SnapshotId, Option<SnapshotId>)> for Lineage {
    fn from_iter<I: IntoIterator<Item = (SnapshotId, Option<SnapshotId>)>>(pairs: I) -> Self {
        Self {
            parents: pairs.into_iter().collect(),
        }
    }
}

impl Lineage {
    /// `id` and what it continues, itself first, as far as that is known. Ends at a snapshot that
    /// is met twice, which no order of the store's operations makes.
    #[must_use]
    pub fn chain(&self, id: SnapshotId) -> Vec<SnapshotId> {
        let mut chain = vec![id];
        let mut at = id;
        while let Some(parent) = self.parents.get(&at).copied().flatten()
            && !chain.contains(&parent)
        {
            chain.push(parent);
            at = parent;
        }
        chain
    }

    /// What continues `id` directly.
    #[must_use]
    pub fn children(&self, id: SnapshotId) -> Vec<SnapshotId> {
        let of = |parent: &Option<SnapshotId>| *parent == Some(id);
        let children = self.parents.iter().filter(|(_id, parent)| of(parent));
        children.map(|(child, _parent)| *child).collect()
    }

    /// `id` and all that continue it, in an order in which each can be removed: whenever that
    /// stops, what is left continues nothing that is gone.
    #[must_use]
    pub fn descent(&self, id: SnapshotId) -> Vec<SnapshotId> {
        let mut found = vec![id];
        let mut next = 0;
        while let Some(at) = found.get(next).copied() {
            let unknown: Vec<_> = self
                .children(at)
                .into_iter()
                .filter(|child| !found.contains(child))
                .collect();
            found.extend(unknown);
            next += 1;
        }
        found.reverse();
        found
    }

    /// What nothing in `roots` continues, in an order in which each can be removed.
    #[must_use]
    pub fn garbage(&self, roots: &BTreeSet<SnapshotId>) -> Vec<SnapshotId> {
        let kept: BTreeSet<SnapshotId> = roots.iter().flat_map(|root| self.chain(*root)).collect();
        let mut garbage: Vec<SnapshotId> = self
            .parents
            .keys()
            .filter(|id| !kept.contains(id))
            .copied()
            .collect();
        garbage.sort_by_key(|id| std::cmp::Reverse(self.chain(*id).len()));
        garbage
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use spore_wire::id::SnapshotId;

    use super::Lineage;

    fn id(n: u8) -> SnapshotId {
        SnapshotId::from_bytes([n; 16])
    }

    #[test]
    fn a_loop_that_cannot_be_ends() {
        let lineage: Lineage = [(id(1), Some(id(2))), (id(2), Some(id(1)))]
            .into_iter()
            .collect();
        assert_eq!(lineage.chain(id(1)), [id(1), id(2)]);
        assert_eq!(lineage.descent(id(1)), [id(2), id(1)]);
    }

    /// A forest: each snapshot continues one made before it, or none.
    fn forests() -> impl Strategy<Value = Vec<(SnapshotId, Option<SnapshotId>)>> {
        proptest::collection::vec(proptest::option::of(any::<u8>()), 1..40).prop_map(|parents| {
            let parent = |number: usize, parent: u8| usize::from(parent).checked_rem(number);
            let name = |number: usize| id(u8::try_from(number).unwrap());
            let pair = |(number, chosen): (usize, Option<u8>)| {
                let parent = chosen.and_then(|chosen| parent(number, chosen));
                (name(number), parent.map(name))
            };
            parents.into_iter().enumerate().map(pair).collect()
        })
    }

    /// Removing in this order, nothing that is left ever continues what is gone.
    fn assert_removable(forest: &[(SnapshotId, Option<SnapshotId>)], order: &[SnapshotId]) {
        let mut left: BTreeSet<SnapshotId> = forest.iter().map(|(id, _parent)| *id).collect();
        for gone in order {
            assert!(left.remove(gone), "{gone} twice");
            for (id, parent) in forest.iter().filter(|(id, _parent)| left.contains(id)) {
                assert!(
                    parent.is_none_or(|parent| left.contains(&parent)),
                    "{id} continues nothing"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn a_collection_keeps_roots_and_what_they_continue_and_nothing_else(
            forest in forests(),
            roots in proptest::collection::btree_set(0..40_u8, 0..6),
        ) {
            let lineage: Lineage = forest.iter().copied().collect();
            let roots: BTreeSet<SnapshotId> = roots.into_iter().map(id).collect();
            let garbage = lineage.garbage(&roots);
            assert_removable(&forest, &garbage);
            for (id, _parent) in &forest {
                let needed = roots.iter().any(|root| lineage.chain(*root).contains(id));
                prop_assert_eq!(garbage.contains(id), !needed);
            }
        }

        #[test]
        fn a_descent_is_all_that_continue_it_and_can_be_removed_in_order(forest in forests()) {
            let lineage: Lineage = forest.iter().copied().collect();
            for (id, _parent) in &forest {
                let descent = lineage.descent(*id);
                assert_removable(&forest, &descent);
                prop_assert_eq!(descent.last(), Some(id));
                for (other, _parent) in &forest {
                    let continues = lineage.chain(*other).contains(id);
                    prop_assert_eq!(descent.contains(other), continues);
                }
            }
        }
    }
}

//! The two steps that the balancing algorithms are made of: packing items into packs of equal
//! number, and giving the busiest experts more copies.
//!
//! Both are the published ones (DeepSeek's expert-parallel load balancer, as in vLLM), and both can
//! be told to keep the copies of one expert apart, which the published ones do not.

/// Deals `weights.len()` items to `packs` packs of equally many items, so that the packs' weights
/// are about equal. Items go in descending weight, equal ones in the order of their index (a stable
/// order, where the published code leaves it open); each goes to the lightest pack that is not
/// full, the first of equal ones. Returns the items of each pack, in the order they came.
///
/// `kind` says which items should not meet in one pack: those with equal values, where another pack
/// has room. `None`: any may.
///
/// # Panics
/// If the items do not divide into the packs.
pub(super) fn balanced_packing(
    weights: &[f64],
    packs: usize,
    kind: Option<&[usize]>,
) -> Vec<Vec<usize>> {
    assert!(packs > 0 && weights.len().is_multiple_of(packs));
    let capacity = weights.len() / packs;
    if capacity == 1 {
        return (0..packs).map(|item| vec![item]).collect();
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let mut items: Vec<Vec<usize>> = vec![Vec::with_capacity(capacity); packs];
    let mut sums = vec![0.0_f64; packs];
    for item in order {
        let meets = |pack: &[usize]| {
            kind.is_some_and(|kind| pack.iter().any(|other| kind[*other] == kind[item]))
        };
        let open = (0..packs).filter(|pack| items[*pack].len() < capacity);
        let lightest = open.min_by(|a, b| {
            let (apart_a, apart_b) = (meets(&items[*a]), meets(&items[*b]));
            apart_a.cmp(&apart_b).then(sums[*a].total_cmp(&sums[*b]))
        });
        let pack = lightest.expect("there is room for every item");
        sums[pack] += weights[item];
        items[pack].push(item);
    }
    items
}

/// How many copies each item gets, of `copies` in all: one each, then one more again and again for
/// the item with the largest weight per copy (the first of equal ones), while it has less than
/// `most`. Returns the item of each copy, the first ones in order, and the counts.
///
/// # Panics
/// If there are fewer copies than items, or more than `most` for each.
pub(super) fn replicate(weights: &[f64], copies: usize, most: usize) -> (Vec<usize>, Vec<usize>) {
    let items = weights.len();
    assert!(copies >= items && copies <= items.saturating_mul(most));
    let mut item_of: Vec<usize> = (0..items).collect();
    let mut counts = vec![1; items];
    for _ in items..copies {
        let mut busiest = None;
        for item in (0..items).filter(|item| counts[*item] < most) {
            let load = weights[item] / counts[item] as f64;
            if busiest.is_none_or(|(_, most)| load > most) {
                busiest = Some((item, load));
            }
        }
        let (item, _) = busiest.expect("checked above: not all have the most they may");
        counts[item] += 1;
        item_of.push(item);
    }
    (item_of, counts)
}

/// Keeps every expert that a rank holds already in its slot (the first one that has it), and puts
/// the others into the free slots in order: fewer weights move.
pub(super) fn preserve_slots(new: &[usize], old: &[usize]) -> Vec<usize> {
    if new.len() != old.len() {
        return new.to_vec();
    }
    let mut used = vec![false; old.len()];
    let mut slots = vec![None; old.len()];
    let mut rest = Vec::new();
    for expert in new {
        match (0..old.len()).find(|slot| !used[*slot] && old[*slot] == *expert) {
            Some(slot) => {
                used[slot] = true;
                slots[slot] = Some(*expert);
            }
            None => rest.push(*expert),
        }
    }
    let mut rest = rest.into_iter();
    slots.into_iter().filter_map(|slot| slot.or_else(|| rest.next())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heavy_items_first_to_the_lightest_pack_with_room() {
        // 9 → 0; 7 → 1; 6 → 1 (13, full of three? no: two of three); 5 → 0 (14); 4 → 1 (17); 1 → 0
        let packs = balanced_packing(&[1.0, 9.0, 5.0, 6.0, 4.0, 7.0], 2, None);
        assert_eq!(packs, [vec![1, 2, 0], vec![5, 3, 4]]);
        // a full pack takes no more, however light: 8 → 0, 1 → 1, 1 → 1, 1 → 0
        assert_eq!(balanced_packing(&[1.0, 1.0, 1.0, 8.0], 2, None), [vec![3, 2], vec![0, 1]]);
        // one item per pack: the identity
        assert_eq!(balanced_packing(&[1.0, 3.0, 2.0], 3, None), [[0], [1], [2]]);
    }

    #[test]
    fn equal_items_keep_their_order() {
        assert_eq!(balanced_packing(&[2.0; 6], 3, None), [[0, 3], [1, 4], [2, 5]]);
    }

    #[test]
    fn copies_of_one_expert_are_kept_apart_where_they_are_told_to() {
        // three copies of expert 0 and three light experts, three packs
        let (weights, kind) = ([5.0, 5.0, 5.0, 9.0, 1.0, 0.5], [0, 0, 0, 1, 2, 3]);
        let expert = |packs: Vec<Vec<usize>>| -> Vec<Vec<usize>> {
            packs
                .into_iter()
                .map(|pack| pack.into_iter().map(|item| kind[item]).collect())
                .collect()
        };
        let published = expert(balanced_packing(&weights, 3, None));
        assert_eq!(published, [[1, 3], [0, 0], [0, 2]]);
        let apart = expert(balanced_packing(&weights, 3, Some(&kind)));
        assert_eq!(apart, [[1, 0], [0, 2], [0, 3]]);
    }

    #[test]
    fn the_busiest_copy_is_doubled() {
        // 90/1, 132/1, 40/1 → 1; 66, 90 → 0; 66 → 1
        let (items, counts) = replicate(&[90.0, 132.0, 40.0], 6, 6);
        assert_eq!(items, [0, 1, 2, 1, 0, 1]);
        assert_eq!(counts, [2, 3, 1]);
        // equal loads: the first
        assert_eq!(replicate(&[1.0; 4], 6, 6).0, [0, 1, 2, 3, 0, 1]);
        // no expert gets more copies than it may have
        assert_eq!(replicate(&[100.0, 1.0, 1.0], 6, 2).1, [2, 2, 2]);
    }

    #[test]
    fn experts_that_stay_keep_their_slots() {
        assert_eq!(preserve_slots(&[3, 1, 7], &[1, 2, 3]), [1, 7, 3]);
        // duplicates use one slot each
        assert_eq!(preserve_slots(&[4, 4, 5], &[5, 4, 6]), [5, 4, 4]);
        assert_eq!(preserve_slots(&[1, 2], &[1, 2, 3]), [1, 2]);
    }
}

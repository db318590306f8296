//! Which templates there are, which are wanted, and how good they are: no files, no VMs.
//!
//! Asked at every start that may fork, so it answers from memory. What it knows of the disk it was
//! told when the node opened and by its builder; a template that is not there any more shows at
//! its next fork and is forgotten then.
//!
//! ```text
//!   (unknown) ──miss──▶ Wanted ──built──▶ Ready ──forks fail──▶ Resting
//!                         │ ▲                                      │
//!                         │ └────────────miss, rested──────────────┘
//!                         └──────────could not be built──▶ Resting
//! ```

use core::time::Duration;
use std::collections::BTreeMap;

use spore_wire::id::{ImageId, SnapshotId};
use spore_wire::node::{Resources, TemplateMiss, TemplateStage};
use spore_wire::snapshot::Shape;
use tokio::time::Instant;

/// Templates kept; behind that the one goes that was not used for longest.
pub(crate) const TEMPLATES_MAX: usize = 32;

/// Forks of a template that may fail in a row, before it is made anew.
const FORK_FAILURES_MAX: u32 = 2;

/// How old a template gets: what was read into its memory is read again now and then.
pub(crate) const AGE_MAX: Duration = Duration::from_hours(30 * 24);

/// The first pause after a build that failed; it doubles.
const REST_LEAST: Duration = Duration::from_secs(30);

/// The longest one.
const REST_MOST: Duration = Duration::from_secs(3600);

/// Everything that two VMs have alike when one can begin from the other's template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key([u8; 32]);

impl Key {
    /// The key of what is made of this, for VMs of this account; of one release, or of any app's.
    pub(crate) fn of(
        account: &str,
        image: ImageId,
        resources: Resources,
        release: Option<&str>,
        host: &Host,
    ) -> Self {
        let Host { shape, guest } = host;
        let parts = [
            account.to_owned(),
            release.unwrap_or_default().to_owned(),
            image.to_string(),
            resources.cpus.to_string(),
            resources.memory_mib.to_string(),
            resources.disk_mib.to_string(),
            shape.driver.clone(),
            shape.version.clone(),
            shape.cpu.clone(),
            shape.kernel.clone(),
            shape.devices.clone(),
            guest.clone(),
        ];
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            // Lengths keep two lists of parts from being one text.
            hasher.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// What a template has of the host that it was made on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// What a snapshot of it asks of a host. The rate of its clock is compared at the fork.
    pub(crate) shape: Shape,
    /// A digest of the guest's kernel and first file system: one that was built before an update
    /// is stale.
    pub(crate) guest: String,
}

/// What a start gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Fork this.
    Hit(SnapshotId),
    /// Boot, and have a template built: it was not wanted before.
    MissFirst(TemplateMiss),
    /// Boot; whatever can be done is on its way.
    Miss(TemplateMiss),
}

/// An app whose release a template is of: its account and its name.
pub(crate) type AppOf = (String, String);

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Index {
    entries: BTreeMap<Key, Entry>,
    uses: u64,
    /// What is being built, and how far that is.
    under_way: Option<(Key, TemplateStage)>,
}

#[derive(Debug)]
struct Entry {
    standing: Standing,
    app: Option<AppOf>,
    used: u64,
    builds_failed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Wanted,
    Ready {
        id: SnapshotId,
        forks_failed: u32,
        /// When it is too old.
        until: Instant,
    },
    Resting {
        until: Instant,
    },
}

impl Index {
    /// What a start of this kind begins from; `app` is whose release it would be of.
    pub(crate) fn ask(&mut self, key: Key, app: Option<AppOf>, now: Instant) -> Answer {
        self.uses += 1;
        let fresh = !self.entries.contains_key(&key);
        if fresh && app.is_some() {
            // Nobody starts that other release any more, unless this one turns out to be no good.
            self.entries.retain(|_key, other| {
                other.app != app || matches!(other.standing, Standing::Ready { .. })
            });
        }
        let entry = self.entries.entry(key).or_insert(Entry {
            standing: Standing::Wanted,
            app,
            used: 0,
            builds_failed: 0,
        });
        entry.used = self.uses;
        if fresh {
            return Answer::MissFirst(TemplateMiss::None);
        }
        match entry.standing {
            Standing::Ready { until, .. } if until <= now => {
                // Its snapshot is nobody's now, and collected.
                entry.standing = Standing::Wanted;
                Answer::MissFirst(TemplateMiss::None)
            }
            Standing::Ready { id, .. } => Answer::Hit(id),
            Standing::Wanted => Answer::Miss(TemplateMiss::Building),
            Standing::Resting { until } if until > now => Answer::Miss(TemplateMiss::Failed),
            Standing::Resting { .. } => {
                entry.standing = Standing::Wanted;
                Answer::MissFirst(TemplateMiss::Failed)
            }
        }
    }

    /// How far this one is, if anybody wanted it.
    pub(crate) fn stage(&self, key: Key) -> Option<TemplateStage> {
        let entry = self.entries.get(&key)?;
        Some(match (entry.standing, self.under_way) {
            (Standing::Ready { .. }, _) => TemplateStage::Ready,
            (Standing::Resting { .. }, _) => TemplateStage::Failed,
            (Standing::Wanted, Some((built, stage))) if built == key => stage,
            (Standing::Wanted, _) => TemplateStage::Waiting,
        })
    }

    /// One is being built.
    pub(crate) fn building(&mut self, key: Key, stage: TemplateStage) {
        self.under_way = Some((key, stage));
    }

    /// A template was built; answers those that are too many now. That is this one itself, if
    /// nobody wants it any more.
    #[must_use]
    pub(crate) fn built(&mut self, key: Key, id: SnapshotId, now: Instant) -> Vec<SnapshotId> {
        match self.entries.remove(&key) {
            None => vec![id],
            Some(wanted) => {
                let mut gone = self.found(key, wanted.app, id, now + AGE_MAX);
                gone.extend(id_of(wanted.standing).filter(|old| *old != id));
                gone
            }
        }
    }

    /// A template is there, and good for so long; answers those that are too many now. Of an app
    /// there is one.
    #[must_use]
    pub(crate) fn found(
        &mut self,
        key: Key,
        app: Option<AppOf>,
        id: SnapshotId,
        until: Instant,
    ) -> Vec<SnapshotId> {
        self.uses += 1;
        let mut gone = match &app {
            Some(app) => self.forget(app),
            None => Vec::new(),
        };
        let standing = Standing::Ready {
            id,
            forks_failed: 0,
            until,
        };
        let entry = Entry {
            standing,
            app,
            used: self.uses,
            builds_failed: 0,
        };
        let before = self.entries.insert(key, entry);
        let before = before.and_then(|before| id_of(before.standing));
        gone.extend(before);
        gone.retain(|old| *old != id);
        gone.extend(self.crowd_out());
        gone
    }

    /// Whatever is of this app is not wanted any more; answers what there was.
    #[must_use]
    pub(crate) fn forget(&mut self, app: &AppOf) -> Vec<SnapshotId> {
        let is_of = |_key: &Key, entry: &mut Entry| entry.app.as_ref() == Some(app);
        let gone = self.entries.extract_if(.., is_of);
        gone.filter_map(|(_key, entry)| id_of(entry.standing))
            .collect()
    }

    fn crowd_out(&mut self) -> Vec<SnapshotId> {
        let mut ready: Vec<(u64, Key, SnapshotId)> = self.ready().collect();
        ready.sort_unstable_by_key(|(used, _key, _id)| *used);
        let surplus = ready.len().saturating_sub(TEMPLATES_MAX);
        let gone = ready.into_iter().take(surplus);
        gone.map(|(_used, key, id)| {
            self.entries.remove(&key);
            id
        })
        .collect()
    }

    fn ready(&self) -> impl Iterator<Item = (u64, Key, SnapshotId)> + '_ {
        let entries = self.entries.iter();
        entries.filter_map(|(key, entry)| Some((entry.used, *key, id_of(entry.standing)?)))
    }

    /// A template could not be built; the next try is some time away.
    pub(crate) fn build_failed(&mut self, key: Key, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&key) {
            rest(entry, now);
        }
    }

    /// Nobody builds it: whoever asks next has it built.
    pub(crate) fn build_dropped(&mut self, key: Key) {
        self.entries.remove(&key);
    }

    /// A VM from this template works.
    pub(crate) fn fork_worked(&mut self, worked: SnapshotId) {
        for entry in self.entries.values_mut() {
            if let Standing::Ready {
                id, forks_failed, ..
            } = &mut entry.standing
                && *id == worked
            {
                *forks_failed = 0;
            }
        }
    }

    /// A VM could not be begun from this template; answers whether the template is given up.
    pub(crate) fn fork_failed(&mut self, failed: SnapshotId, now: Instant) -> bool {
        for entry in self.entries.values_mut() {
            if let Standing::Ready {
                id, forks_failed, ..
            } = &mut entry.standing
                && *id == failed
            {
                *forks_failed += 1;
                if *forks_failed >= FORK_FAILURES_MAX {
                    rest(entry, now);
                    return true;
                }
            }
        }
        false
    }

    /// Every template that a start may be given.
    pub(crate) fn ids(&self) -> Vec<SnapshotId> {
        self.ready().map(|(_used, _key, id)| id).collect()
    }
}

const fn id_of(standing: Standing) -> Option<SnapshotId> {
    match standing {
        Standing::Ready { id, .. } => Some(id),
        Standing::Wanted | Standing::Resting { .. } => None,
    }
}

fn rest(entry: &mut Entry, now: Instant) {
    let doubled = REST_LEAST.saturating_mul(1 << entry.builds_failed.min(16));
    entry.builds_failed = entry.builds_failed.saturating_add(1);
    let until = now + doubled.min(REST_MOST);
    entry.standing = Standing::Resting { until };
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use spore_wire::id::{ImageId, SnapshotId};
    use spore_wire::node::{Resources, TemplateMiss, TemplateStage};
    use spore_wire::snapshot::Shape;
    use tokio::time::Instant;

    use super::{AGE_MAX, Answer, AppOf, Host, Index, Key, TEMPLATES_MAX};

    const SMALL: Resources = Resources {
        cpus: 1,
        memory_mib: 128,
        disk_mib: 64,
    };

    fn host() -> Host {
        Host {
            shape: Shape {
                driver: "sim".to_owned(),
                version: "1".to_owned(),
                cpu: "model".to_owned(),
                tsc_khz: 1000,
                kernel: "6.1".to_owned(),
                devices: "d".to_owned(),
            },
            guest: "g".to_owned(),
        }
    }

    fn key(memory_mib: u32) -> Key {
        let resources = Resources {
            memory_mib,
            ..SMALL
        };
        Key::of("me", ImageId::from_hash([1; 32]), resources, None, &host())
    }

    fn id(number: u8) -> SnapshotId {
        SnapshotId::from_bytes([number; 16])
    }

    #[test]
    fn each_part_makes_another_key() {
        let image = ImageId::from_hash([1; 32]);
        let mut updated = host();
        updated.guest = "h".to_owned();
        let mut moved = host();
        moved.shape.version = "2".to_owned();
        let two = Resources { cpus: 2, ..SMALL };
        let all = [
            key(128),
            key(256),
            Key::of("public", image, SMALL, None, &host()),
            Key::of("me", ImageId::from_hash([2; 32]), SMALL, None, &host()),
            Key::of("me", image, two, None, &host()),
            Key::of("me", image, SMALL, None, &updated),
            Key::of("me", image, SMALL, None, &moved),
            Key::of("me", image, SMALL, Some("notes"), &host()),
            Key::of("me", image, SMALL, Some("others"), &host()),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one), "{at}");
        }
        // Two rates of one clock that was measured twice are one host.
        let mut measured = host();
        measured.shape.tsc_khz = 1001;
        assert_eq!(key(128), Key::of("me", image, SMALL, None, &measured));
    }

    #[test]
    fn a_template_is_asked_for_once_and_then_given() {
        let (mut index, now) = (Index::default(), Instant::now());
        let first = index.ask(key(1), None, now);
        assert_eq!(first, Answer::MissFirst(TemplateMiss::None));
        assert_eq!(
            index.ask(key(1), None, now),
            Answer::Miss(TemplateMiss::Building)
        );
        assert!(index.built(key(1), id(1), now).is_empty());
        assert_eq!(index.ask(key(1), None, now), Answer::Hit(id(1)));
        // A second one in its place frees the first.
        assert_eq!(index.built(key(1), id(2), now), [id(1)]);
        assert_eq!(index.ids(), [id(2)]);
    }

    #[test]
    fn an_old_one_is_made_anew() {
        let (mut index, now) = (Index::default(), Instant::now());
        let _first = index.ask(key(1), None, now);
        let _gone = index.built(key(1), id(1), now);
        let almost = now + AGE_MAX - Duration::from_secs(1);
        assert_eq!(index.ask(key(1), None, almost), Answer::Hit(id(1)));
        let then = now + AGE_MAX;
        let old = index.ask(key(1), None, then);
        assert_eq!(old, Answer::MissFirst(TemplateMiss::None));
        assert!(index.ids().is_empty(), "nothing keeps it on the disk");
        assert!(index.built(key(1), id(2), then).is_empty());
        assert_eq!(index.ask(key(1), None, then), Answer::Hit(id(2)));
    }

    #[test]
    fn how_far_one_is_can_be_asked() {
        let (mut index, now) = (Index::default(), Instant::now());
        assert_eq!(index.stage(key(1)), None, "nobody wants it");
        let _first = index.ask(key(1), None, now);
        let _first = index.ask(key(2), None, now);
        index.building(key(2), TemplateStage::Booting);
        let stages = [index.stage(key(1)), index.stage(key(2))].map(Option::unwrap);
        assert_eq!(stages, [TemplateStage::Waiting, TemplateStage::Booting]);
        index.build_failed(key(2), now);
        assert_eq!(index.stage(key(2)), Some(TemplateStage::Failed));
        let _gone = index.built(key(1), id(1), now);
        assert_eq!(index.stage(key(1)), Some(TemplateStage::Ready));
    }

    #[test]
    fn one_that_fails_is_made_anew_after_a_longer_and_longer_rest() {
        let (mut index, mut now) = (Index::default(), Instant::now());
        let _first = index.ask(key(1), None, now);
        let mut rests = Vec::new();
        for _build in 0..4 {
            index.build_failed(key(1), now);
            let begun = now;
            while index.ask(key(1), None, now) == Answer::Miss(TemplateMiss::Failed) {
                now += Duration::from_secs(1);
            }
            rests.push((now - begun).as_secs());
        }
        assert_eq!(rests, [30, 60, 120, 240]);
    }

    #[test]
    fn forks_that_fail_in_a_row_end_a_template_and_one_that_works_counts_anew() {
        let (mut index, now) = (Index::default(), Instant::now());
        let _first = index.ask(key(1), None, now);
        let _gone = index.built(key(1), id(1), now);
        assert!(!index.fork_failed(id(1), now));
        index.fork_worked(id(1));
        assert!(!index.fork_failed(id(1), now));
        assert!(!index.fork_failed(id(9), now), "another's");
        assert!(index.fork_failed(id(1), now));
        assert_eq!(
            index.ask(key(1), None, now),
            Answer::Miss(TemplateMiss::Failed)
        );
    }

    #[test]
    fn the_least_used_one_goes_when_there_are_too_many() {
        let (mut index, now) = (Index::default(), Instant::now());
        let count = u8::try_from(TEMPLATES_MAX).unwrap();
        for number in 0..count {
            assert!(
                index
                    .found(key(number.into()), None, id(number), now + AGE_MAX)
                    .is_empty()
            );
        }
        assert_eq!(index.ask(key(0), None, now), Answer::Hit(id(0)));
        assert_eq!(
            index.found(key(1000), None, id(count), now + AGE_MAX),
            [id(1)]
        );
        assert_eq!(index.ids().len(), TEMPLATES_MAX);
    }

    fn of(release: u8) -> (Key, Option<AppOf>) {
        let release = format!("release {release}");
        let key = Key::of(
            "me",
            ImageId::from_hash([1; 32]),
            SMALL,
            Some(&release),
            &host(),
        );
        (key, Some(("me".to_owned(), "notes".to_owned())))
    }

    #[test]
    fn an_app_has_one_template_and_it_is_of_the_release_that_was_built_last() {
        let (mut index, now) = (Index::default(), Instant::now());
        let ((old, app), (new, _)) = (of(1), of(2));
        let first = index.ask(old, app.clone(), now);
        assert_eq!(first, Answer::MissFirst(TemplateMiss::None));
        assert!(index.built(old, id(1), now).is_empty());
        // Until the next one's is there, going back needs no other.
        let first = index.ask(new, app.clone(), now);
        assert_eq!(first, Answer::MissFirst(TemplateMiss::None));
        assert_eq!(index.ask(old, app.clone(), now), Answer::Hit(id(1)));
        assert_eq!(index.built(new, id(2), now), [id(1)]);
        assert_eq!(index.ask(new, app.clone(), now), Answer::Hit(id(2)));
        let again = index.ask(old, app.clone(), now);
        assert_eq!(again, Answer::MissFirst(TemplateMiss::None));
        assert_eq!(index.ids(), [id(2)]);
    }

    #[test]
    fn what_is_built_for_an_app_that_was_forgotten_is_useless() {
        let (mut index, now) = (Index::default(), Instant::now());
        let ((old, app), (new, _)) = (of(1), of(2));
        let app = app.unwrap();
        let other = index.ask(key(1), None, now);
        assert_eq!(other, Answer::MissFirst(TemplateMiss::None));
        let _first = index.ask(old, Some(app.clone()), now);
        assert!(index.forget(&app).is_empty(), "it is being built");
        assert_eq!(index.built(old, id(1), now), [id(1)]);
        let _first = index.ask(new, Some(app.clone()), now);
        assert!(index.built(new, id(2), now).is_empty());
        assert_eq!(index.forget(&app), [id(2)]);
        assert_eq!(
            index.ask(key(1), None, now),
            Answer::Miss(TemplateMiss::Building)
        );
    }

    #[test]
    fn a_release_that_is_no_good_leaves_no_trace_once_there_is_another() {
        let (mut index, now) = (Index::default(), Instant::now());
        for release in 0..100 {
            let (key, app) = of(release);
            let _first = index.ask(key, app, now);
            index.build_failed(key, now);
        }
        assert_eq!(index.entries.len(), 1);
    }
}

//! Who a process runs as: names of the image's `/etc/passwd` and `/etc/group`, by hand.
//!
//! Called by [`crate::runner`], [`crate::exec`] and [`crate::file`]. There is no NSS in a static
//! binary, and the files are a tenant's: they are text to be parsed, nothing is believed. Pure.

use spore_wire::guest::DEFAULT_UID;
use thiserror::Error;

/// The home of the default user when the image does not know one.
pub const DEFAULT_HOME: &str = "/home/app";

/// The name of the default user when the image does not know one.
pub const DEFAULT_NAME: &str = "app";

/// The most supplementary groups of a process (`NGROUPS_MAX` is larger; this is a limit of ours).
const GROUPS_MAX: usize = 256;

/// Somebody to run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// The user's own group.
    pub gid: u32,
    /// The groups that the image adds.
    pub groups: Vec<u32>,
    /// As in the image, else a home of our own.
    pub home: String,
    /// As in the image.
    pub known_as: Option<String>,
}

/// Why there is nobody of that name.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UserError {
    /// The image has no such user.
    #[error("user `{0}` is not in the image's /etc/passwd: name one that is, or give a number")]
    NoUser(String),
    /// The image has no such group.
    #[error("group `{0}` is not in the image's /etc/group: name one that is, or give a number")]
    NoGroup(String),
    /// An empty part.
    #[error("user `{0}` is neither `name`, `uid` nor `uid:gid`")]
    Malformed(String),
}

impl Identity {
    /// Finds `wanted` (`name`, `uid`, `uid:gid` or `name:group`) in the two files' texts; `None`
    /// is [`DEFAULT_UID`].
    ///
    /// # Errors
    /// [`UserError`] when a name is not there.
    pub fn resolve(wanted: Option<&str>, passwd: &str, group: &str) -> Result<Self, UserError> {
        let default = DEFAULT_UID.to_string();
        let wanted = wanted.unwrap_or(&default);
        let malformed = || UserError::Malformed(wanted.to_owned());
        let (user, wanted_group) = match wanted.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (wanted, None),
        };
        if user.is_empty() || wanted_group.is_some_and(str::is_empty) {
            return Err(malformed());
        }
        let entry = users(passwd).find(|entry| match user.parse::<u32>() {
            Ok(uid) => entry.uid == uid,
            Err(_) => entry.name == user,
        });
        let uid = match (&entry, user.parse()) {
            (Some(entry), _) => entry.uid,
            (None, Ok(uid)) => uid,
            (None, Err(_)) => return Err(UserError::NoUser(user.to_owned())),
        };
        // A number that the image does not know gets the group of the same number, so that two
        // unknown users do not share one; 4294967295 means "no change" to the kernel.
        let own_gid = entry.as_ref().map_or(uid, |entry| entry.gid);
        let gid = match wanted_group {
            None => own_gid,
            Some(name) => gid_of(name, group)?,
        };
        if uid == u32::MAX || gid == u32::MAX {
            return Err(malformed());
        }
        let known_as = entry.as_ref().map(|entry| entry.name.to_owned());
        let groups = known_as.as_deref().map(|name| groups_of(name, group));
        let home = entry
            .map(|entry| entry.home)
            .filter(|home| home.starts_with('/'));
        Ok(Self {
            uid,
            gid,
            groups: groups.unwrap_or_default(),
            home: home.unwrap_or(DEFAULT_HOME).to_owned(),
            known_as,
        })
    }
}

struct UserEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = UserEntry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1)?;
        (!name.is_empty()).then_some(UserEntry {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// Name, number and members of each line of a group file.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

fn gid_of(wanted: &str, group: &str) -> Result<u32, UserError> {
    if let Ok(gid) = wanted.parse() {
        return Ok(gid);
    }
    group_entries(group)
        .find(|(name, _gid, _members)| *name == wanted)
        .map(|(_name, gid, _members)| gid)
        .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))
}

fn groups_of(user: &str, group: &str) -> Vec<u32> {
    group_entries(group)
        .filter(|(_name, gid, members)| {
            *gid != u32::MAX && members.split(',').any(|member| member == user)
        })
        .map(|(_name, gid, _members)| gid)
        .take(GROUPS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_ne, proptest};

    use super::{DEFAULT_HOME, Identity, UserError};

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken line\n\
        www:x:33:33:www-data:/var/www:/usr/sbin/nologin\nann:x:1000:100:,,,:/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nvideo:x:44:ann,www\nssl:x:105:www\n";

    #[test]
    fn a_name_brings_its_groups_and_home() {
        let www = Identity::resolve(Some("www"), PASSWD, GROUP).unwrap();
        assert_eq!((www.uid, www.gid), (33, 33));
        assert_eq!(www.groups, [44, 105]);
        assert_eq!(www.home, "/var/www");
    }

    #[test]
    fn nobody_named_is_the_default_user_known_or_not() {
        let known = Identity::resolve(None, PASSWD, GROUP).unwrap();
        assert_eq!(
            (known.uid, known.gid, known.home.as_str()),
            (1000, 100, "/home/ann")
        );
        let unknown = Identity::resolve(None, "", "").unwrap();
        assert_eq!((unknown.uid, unknown.gid), (1000, 1000));
        assert_eq!(
            (unknown.home.as_str(), unknown.known_as),
            (DEFAULT_HOME, None)
        );
    }

    #[test]
    fn numbers_and_groups_are_taken_as_given() {
        let both = Identity::resolve(Some("33:44"), PASSWD, GROUP).unwrap();
        assert_eq!((both.uid, both.gid), (33, 44));
        let named = Identity::resolve(Some("ann:video"), PASSWD, GROUP).unwrap();
        assert_eq!((named.uid, named.gid), (1000, 44));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let none = Identity::resolve(Some("bob"), PASSWD, GROUP);
        assert_eq!(none, Err(UserError::NoUser("bob".to_owned())));
        let none = Identity::resolve(Some("ann:wheel"), PASSWD, GROUP);
        assert_eq!(none, Err(UserError::NoGroup("wheel".to_owned())));
        for wrong in ["", ":", "1:", ":1", "4294967295", "1:4294967295"] {
            assert!(
                Identity::resolve(Some(wrong), PASSWD, GROUP).is_err(),
                "{wrong}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_file_gives_the_number_that_changes_nothing(
            wanted in "[a-z0-9:]{0,12}", passwd in "([a-z0-9:/]{0,40}\n){0,5}",
            group in "([a-z0-9:,]{0,40}\n){0,5}",
        ) {
            if let Ok(identity) = Identity::resolve(Some(&wanted), &passwd, &group) {
                prop_assert_ne!(identity.uid, u32::MAX);
                prop_assert_ne!(identity.gid, u32::MAX);
            }
        }
    }
}
